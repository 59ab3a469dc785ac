//! The buffer of a request as it was at one moment.

use crate::sandbox::{BadRequest, BufferAccess};
use instar_guest_abi::Request;
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

/// A copy of a request's buffer, under its addresses. A guest that runs in a process may change its memory while the
/// host reads it, so bytes that decide whether they may be written are copied first, and the host writes the copy.
pub struct Snapshot {
    region: MmapRegion,
    start: u64,
}

impl Snapshot {
    /// Copy this request's buffer. `None` if it has none in the heap, which the execution of the request reports.
    ///
    /// # Errors
    /// A lack of memory.
    pub fn of(memory: &dyn BufferAccess, request: &Request) -> Result<Option<Self>, BadRequest> {
        let Some(slice) = memory.heap_slice(request.buffer, request.length).filter(|slice| !slice.is_empty()) else {
            return Ok(None);
        };
        let region = MmapRegion::new(slice.len());
        let region = region.map_err(|error| BadRequest(format!("a buffer that cannot be copied: {error}")))?;
        slice.copy_to_volatile_slice(region.as_volatile_slice());
        Ok(Some(Self { region, start: request.buffer }))
    }
}

impl BufferAccess for Snapshot {
    fn heap_slice(&self, address: u64, length: u64) -> Option<VolatileSlice<'_>> {
        let offset = usize::try_from(address.checked_sub(self.start)?).ok()?;
        self.region.get_slice(offset, usize::try_from(length).ok()?).ok()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use crate::commit::repeated::Repeated;
    use crate::commit::CommitEvents;
    use crate::devices::{Device, Devices};
    use crate::operation::Events;
    use crate::plugins::Mark;
    use crate::sandbox::BufferAccess;
    use instar_guest_abi::{request_status, Phase, Request, DEVICE_OUTPUT};
    use std::cell::Cell;
    use std::os::unix::fs::FileExt;
    use vm_memory::VolatileSlice;

    const LENGTH: usize = 4096;

    /// A guest's memory that shows the file's bytes at the first read, and the bytes that it wants to write at every
    /// later one.
    struct Changing(Cell<u32>);

    impl BufferAccess for Changing {
        fn heap_slice(&self, _: u64, length: u64) -> Option<VolatileSlice<'_>> {
            let looks = self.0.replace(self.0.get() + 1);
            let memory = vec![if looks == 0 { 7 } else { 0xee }; usize::try_from(length).ok()?].leak();
            Some(VolatileSlice::from(memory))
        }
    }

    #[test]
    fn what_was_compared_is_what_is_written() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; LENGTH], 0).unwrap();
        let mut devices = Devices::new();
        let length = LENGTH as u64;
        devices.attach(DEVICE_OUTPUT, Device::new(file.try_clone().unwrap(), true, length, length, false));
        devices.enter(Phase::Target).unwrap();
        let mark = Mark { format: "other".to_owned(), certain: true, bytes: 0..4, cluster_size: 65536 };
        let mut events = CommitEvents { repeated: Repeated::new(&mark), ..CommitEvents::default() };
        let mut requests = [Request::write(DEVICE_OUTPUT, 0, 0x20_0000, length)];
        events.requests(&mut devices, &Changing(Cell::new(0)), &mut requests).unwrap();
        assert_eq!(requests[0].status, request_status::OK);
        let mut found = [0; LENGTH];
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == [7; LENGTH], "the header of another format was changed");
        // It is written, and not only left out.
        assert!(devices.device(DEVICE_OUTPUT).unwrap().is_changed());
    }
}
