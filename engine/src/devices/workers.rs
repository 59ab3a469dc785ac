//! Threads that copy and compare pieces of files side by side: one waits for the disk while another reads.
//!
//! They are started before the process is [confined](crate::confine), since it can start none afterwards. Each takes all
//! files out of its own reach first; the filter of system calls is applied to all threads at once.

use super::aligned::AlignedBuffer;
use super::piece::{Piece, PIECE};
use crate::confine::{paths, Reach, SignalsBlocked};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Threads besides the calling one. More threads did not increase throughput on any disk we tried; two processors are enough for these.
const THREADS: usize = 3;

/// Work for a thread.
pub trait Task: Send + Sync {
    /// Bytes of it.
    fn length(&self) -> u64;

    /// Its number, or that of the first of several that it is a segment of: none is larger than that of a task behind it.
    fn first(&self) -> usize;

    /// Do it, with a buffer of [`PIECE`] bytes.
    ///
    /// # Errors
    /// The number of what failed, and why.
    fn run(&self, buffer: &mut AlignedBuffer) -> Result<(), (usize, io::Error)>;
}

impl Task for Piece {
    fn length(&self) -> u64 {
        Self::length(self)
    }

    fn first(&self) -> usize {
        self.first_copy()
    }

    fn run(&self, buffer: &mut AlignedBuffer) -> Result<(), (usize, io::Error)> {
        self.copy(buffer)
    }
}

/// The tasks that are to be done, and what became of those that were.
#[derive(Default)]
struct Board {
    /// In order: whatever is before a piece that failed was copied, or failed itself.
    waiting: VecDeque<Box<dyn Task>>,
    /// Number of pieces that somebody is copying.
    under_way: usize,
    /// The first copy of which a piece failed, and why.
    failed: Option<(usize, io::Error)>,
    /// The threads are to end.
    over: bool,
    /// Threads that are ready.
    ready: usize,
}

impl fmt::Debug for Board {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Board").field("waiting", &self.waiting.len()).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Shared {
    board: Mutex<Board>,
    /// There are pieces, or an end.
    news: Condvar,
    /// A piece is done, or a thread is ready.
    done: Condvar,
    /// Bytes that were copied and have not been reported.
    moved: AtomicU64,
}

impl Shared {
    fn board(&self) -> MutexGuard<'_, Board> {
        // Nothing panics with the board in its hands, and each of its states is a valid one.
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next piece, which is then under way.
    fn take(board: &mut Board) -> Option<Box<dyn Task>> {
        let piece = board.waiting.pop_front()?;
        board.under_way += 1;
        Some(piece)
    }

    /// Do a task that was taken, and say what became of it.
    fn run(&self, piece: &dyn Task, buffer: &mut AlignedBuffer) {
        let result = piece.run(buffer);
        let mut board = self.board();
        board.under_way -= 1;
        match result {
            Ok(()) => {
                self.moved.fetch_add(piece.length(), Relaxed);
            }
            Err((copy, error)) => {
                board.waiting.clear();
                if board.failed.as_ref().is_none_or(|(first, _)| copy < *first) {
                    board.failed = Some((copy, error));
                }
            }
        }
        // Nobody waits for the end of a piece while others are to be taken.
        if board.under_way == 0 && board.waiting.is_empty() {
            self.done.notify_all();
        }
    }

    /// What a thread does until the end.
    fn work(&self) {
        // Best effort, as for the process.
        let _ = paths::restrict(&Reach::default());
        self.board().ready += 1;
        self.done.notify_all();
        let mut buffer = None;
        loop {
            let mut board = self.board();
            let piece = loop {
                if board.over {
                    return;
                }
                match Self::take(&mut board) {
                    Some(piece) => break piece,
                    None => board = self.news.wait(board).unwrap_or_else(PoisonError::into_inner),
                }
            };
            drop(board);
            self.run(piece.as_ref(), buffer.get_or_insert_with(|| AlignedBuffer::new(PIECE)));
        }
    }
}

/// The threads. They end with it.
#[derive(Debug)]
pub struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    buffer: AlignedBuffer,
}

impl Workers {
    /// A file that is shorter than this, in bytes, holds too little to be copied by several threads.
    pub const MUCH: u64 = 4 << 20;

    /// Start the threads, and wait until each has given up the rights that it does not need.
    ///
    /// # Errors
    /// When the system starts no thread.
    pub fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let mut workers = Self { shared, threads: Vec::new(), buffer: AlignedBuffer::new(PIECE) };
        let signals = SignalsBlocked::new();
        for _ in 0..THREADS {
            let shared = Arc::clone(&workers.shared);
            // If one cannot be started, those before it end with `workers`.
            let builder = std::thread::Builder::new().name("copy".into()).stack_size(256 << 10);
            workers.threads.push(builder.spawn(move || shared.work())?);
        }
        drop(signals);
        let mut board = workers.shared.board();
        while board.ready < THREADS {
            board = workers.shared.done.wait(board).unwrap_or_else(PoisonError::into_inner);
        }
        drop(board);
        Ok(workers)
    }

    /// Copy these pieces, whose copies are in ascending order. Calls `each` now and then with the number of moved bytes, and
    /// stops on its error. No copy is in progress when this returns.
    ///
    /// # Errors
    /// Which copy failed, and why: all before it are complete, and of those after it some may be.
    pub fn copy(
        &mut self,
        pieces: VecDeque<Piece>,
        each: impl FnMut(u64) -> io::Result<()>,
    ) -> Result<(), (usize, io::Error)> {
        self.run(pieces, each)
    }

    /// Do these tasks, whose numbers are in ascending order, in the same way.
    ///
    /// # Errors
    /// Which task failed first, and why: all before it are done.
    pub(super) fn run(
        &mut self,
        tasks: VecDeque<impl Task + 'static>,
        mut each: impl FnMut(u64) -> io::Result<()>,
    ) -> Result<(), (usize, io::Error)> {
        let shared = &*self.shared;
        let mut board = shared.board();
        board.failed = None;
        board.waiting = tasks.into_iter().map(|task| Box::new(task) as Box<dyn Task>).collect();
        // One piece is this thread's.
        for _ in 1..board.waiting.len().min(1 + THREADS) {
            shared.news.notify_one();
        }
        loop {
            if let Some(piece) = Shared::take(&mut board) {
                drop(board);
                shared.run(piece.as_ref(), &mut self.buffer);
                let stopped = each(shared.moved.swap(0, Relaxed)).err();
                board = shared.board();
                if let (Some(error), copy) = (stopped, piece.first()) {
                    board.waiting.clear();
                    board.failed.get_or_insert((copy, error));
                }
            } else if board.under_way > 0 {
                board = shared.done.wait(board).unwrap_or_else(PoisonError::into_inner);
            } else {
                break;
            }
        }
        let failed = board.failed.take();
        drop(board);
        let stopped = each(shared.moved.swap(0, Relaxed)).err();
        match (failed, stopped) {
            (Some(failed), _) => Err(failed),
            (None, Some(error)) => Err((0, error)),
            (None, None) => Ok(()),
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.board().over = true;
        self.shared.news.notify_all();
        for thread in self.threads.drain(..) {
            // One that panicked is over, too.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
mod tests {
    use super::super::piece::{pieces, Segment};
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    fn file(bytes: &[u8]) -> Arc<File> {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        Arc::new(file)
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn segments(source: &Arc<File>, count: usize, length: u64) -> Vec<Segment> {
        let segment = |copy: usize| {
            let at = copy as u64 * length;
            Segment { source: Arc::clone(source), from: at, to: at, length, copy }
        };
        (0..count).map(segment).collect()
    }

    #[test]
    fn everything_arrives_and_is_reported() {
        let bytes: Vec<u8> = (0..5_000_000u32).map(|i| (i % 251) as u8).collect();
        let (source, target) = (file(&bytes), file(&[]));
        let mut workers = Workers::start().unwrap();
        for _ in 0..3 {
            let mut moved = 0;
            let report = |bytes| {
                moved += bytes;
                Ok(())
            };
            workers.copy(pieces(&target, segments(&source, 50, 100_000)), report).unwrap();
            assert_eq!(moved, 5_000_000);
            assert!(content(&target) == bytes);
            target.set_len(0).unwrap();
        }
        workers.copy(VecDeque::new(), |_| Ok(())).unwrap();
    }

    #[test]
    fn what_the_source_lacks_is_zero() {
        let (source, target) = (file(&[7; 1000]), file(&[9; 3000]));
        Workers::start().unwrap().copy(pieces(&target, segments(&source, 3, 900)), |_| Ok(())).unwrap();
        let bytes = content(&target);
        assert!(bytes[..1000] == [7; 1000] && bytes[1000..2700] == [0; 1700] && bytes[2700..] == [9; 300]);
    }

    #[test]
    fn of_several_failures_the_first_copy_is_named_and_those_before_it_are_complete() {
        let bytes = vec![5; 4_000_000];
        let (source, target) = (file(&bytes), file(&[]));
        let unreadable = Arc::new(File::options().write(true).open("/dev/null").unwrap());
        let mut workers = Workers::start().unwrap();
        for first in [0, 1, 17, 39] {
            let mut segments = segments(&source, 40, 100_000);
            for segment in segments.iter_mut().skip(first) {
                segment.source = Arc::clone(&unreadable);
            }
            let (copy, error) = workers.copy(pieces(&target, segments), |_| Ok(())).unwrap_err();
            assert_eq!((copy, error.raw_os_error()), (first, Some(libc::EBADF)));
            assert!(content(&target).starts_with(&bytes[..first * 100_000]));
            target.set_len(0).unwrap();
        }
        // A file that cannot be written fails the first copy.
        let closed_for_writing = Arc::new(File::open("/dev/null").unwrap());
        let (copy, error) =
            workers.copy(pieces(&closed_for_writing, segments(&source, 40, 100_000)), |_| Ok(())).unwrap_err();
        assert_eq!((copy, error.raw_os_error()), (0, Some(libc::EBADF)));
        // It can be used again.
        workers.copy(pieces(&target, segments(&source, 40, 100_000)), |_| Ok(())).unwrap();
        assert!(content(&target) == bytes);
    }

    #[test]
    fn it_can_be_stopped() {
        let (source, target) = (file(&[1; 1000]), file(&[]));
        let stop = |_| Err(io::Error::from_raw_os_error(libc::EINTR));
        let (_, error) = Workers::start().unwrap().copy(pieces(&target, segments(&source, 1000, 1)), stop).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINTR));
    }
}
