//! The layers below a sink, passed from the operation's module to the sink's.

use super::{call, done, protocol, store};
use crate::{BlockIo, DriverResult, ReadBelow};
use core::ffi::c_void;
use core::marker::PhantomData;
use core::slice;
use instar_guest_abi::{Failure, ReadBelowOps};

/// The table as a [`ReadBelow`], in the sink's module.
pub struct TableBelow(ReadBelowOps);

impl TableBelow {
    pub fn new(ops: ReadBelowOps) -> Self {
        Self(ops)
    }
}

impl ReadBelow for TableBelow {
    fn exists(&self) -> bool {
        self.0.exists != 0
    }

    fn read(&mut self, _: &mut dyn BlockIo, guest_offset: u64, buffer: &mut [u8]) -> DriverResult<()> {
        call(|failure| (self.0.read)(self.0.context, guest_offset, buffer.as_mut_ptr(), buffer.len(), failure))
    }
}

/// A [`ReadBelow`] and its I/O as a table, in the operation's module.
pub struct LentBelow<'a> {
    io: &'a mut dyn BlockIo,
    below: &'a mut dyn ReadBelow,
}

/// The table of a [`LentBelow`], valid while that is borrowed.
pub struct LentTable<'a> {
    pub ops: ReadBelowOps,
    borrowed: PhantomData<&'a mut ()>,
}

impl<'a> LentBelow<'a> {
    pub fn new(io: &'a mut dyn BlockIo, below: &'a mut dyn ReadBelow) -> Self {
        Self { io, below }
    }

    pub fn table(&mut self) -> LentTable<'_> {
        let exists = u32::from(self.below.exists());
        let context = (&raw mut *self).cast::<c_void>();
        LentTable { ops: ReadBelowOps { context, read, exists, reserved: 0 }, borrowed: PhantomData }
    }
}

extern "C" fn read(
    context: *mut c_void,
    guest_offset: u64,
    buffer: *mut u8,
    length: usize,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the context is the `LentBelow` whose table this is, borrowed for as long as the table is.
    let lent = unsafe { context.cast::<LentBelow<'_>>().as_mut() };
    let (Some(lent), false) = (lent, buffer.is_null()) else {
        // SAFETY: the interface passes null or a writable failure.
        return unsafe { store(&protocol("read below without context or buffer"), failure) };
    };
    // SAFETY: the interface makes `length` bytes at `buffer` exclusive to this call.
    let buffer = unsafe { slice::from_raw_parts_mut(buffer, length) };
    // SAFETY: the interface passes null or a writable failure.
    unsafe { done(lent.below.read(lent.io, guest_offset, buffer), failure) }
}
