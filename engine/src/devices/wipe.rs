//! Overwriting freed space, for storage on which "emptied" has to mean gone: punching a hole or cutting a file leaves the old
//! content of its blocks on the disk.
//!
//! A guest gives back only space to which nothing refers any more, durably, so zeroes in it do no harm: after a crash, the
//! image is the same as without them, and a second run overwrites and gives back the rest. The zeroes are durable before the
//! space is given back. Adjacent requests that give space back share one flush.

use super::{index, Device, Devices};
use crate::sandbox::{BadRequest, BufferAccess};
use instar_guest_abi::{DeviceRole, Request, RequestOp};
use std::io;
use std::ops::Range;

/// Bytes that are written at once.
const PIECE: u64 = 1 << 20;

/// Whether, and how far, the requests of a doorbell were looked at.
#[derive(Debug, Default)]
pub(super) struct Wiped {
    /// Requests before this one give back what was overwritten.
    until: usize,
}

impl Devices {
    /// Overwrite freed space of the image that is emptied from now on.
    pub fn wipe(&mut self) {
        for device in self.slots.iter_mut().flatten() {
            device.wiped = matches!(device.role, DeviceRole::Overlay { emptied: true, .. });
        }
    }

    /// Overwrite what the first of these requests, of which `done` were executed, gives back, and what those give back that
    /// follow it.
    ///
    /// # Errors
    /// A request that breaks a rule.
    pub(super) fn wipe_before(
        &mut self,
        wiped: &mut Wiped,
        done: usize,
        memory: &dyn BufferAccess,
        requests: &[Request],
    ) -> Result<io::Result<()>, BadRequest> {
        if done < wiped.until {
            return Ok(Ok(()));
        }
        let mut overwritten = false;
        for request in requests {
            let Some(range) = self.gives_back(request) else { break };
            match super::check::check(self, memory, request) {
                Ok(_) => {}
                Err(_) if overwritten => break,
                Err(why) => return Err(why),
            }
            if let Err(error) = self.overwrite(request.device, range) {
                return Ok(Err(error));
            }
            overwritten = true;
            wiped.until = wiped.until.max(done) + 1;
        }
        let dirty = requests.first().filter(|_| overwritten).map(|request| request.device);
        Ok(dirty.map_or(Ok(()), |device| self.flush(device)))
    }

    /// What a request gives back of an image that is wiped.
    fn gives_back(&self, request: &Request) -> Option<Range<u64>> {
        let device = self.device(request.device).filter(|device| device.wiped)?;
        match RequestOp::from_u32(request.op)? {
            RequestOp::Zero => Some(request.offset..request.offset.saturating_add(request.length).min(device.length)),
            RequestOp::SetLength => Some(request.offset..device.length),
            _ => None,
        }
    }

    /// Write zeroes over the data of a range.
    fn overwrite(&mut self, number: u32, range: Range<u64>) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            self.pace.go_on()?;
            let device = self.slots.get_mut(index(number)).and_then(Option::as_mut);
            let device = device.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
            let (data, end) = device.next_data(at, range.end);
            if data >= range.end {
                break;
            }
            let end = end.min(data.saturating_add(self.pace.piece(PIECE)));
            at = end;
            let length = end - data;
            if device.fixed_length && device.holds_zeroes(data, length)? {
                continue;
            }
            device.touch();
            device.write_all_at(data, &vec![0; usize::try_from(length).unwrap_or(0)])?;
            self.statistics.overwritten += length;
            self.pace.moved(length)?;
        }
        Ok(())
    }
}

impl Device {
    /// Whether a range reads as zeroes: of a block device, nobody knows without reading it.
    fn holds_zeroes(&self, offset: u64, length: u64) -> io::Result<bool> {
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        self.read_padded(offset, &mut bytes)?;
        Ok(bytes.iter().all(|&byte| byte == 0))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use instar_guest_abi::{request_status, Phase};
    use std::os::unix::fs::FileExt;
    use vm_memory::VolatileSlice;

    const OVERLAY: u32 = 3;
    const LENGTH: u64 = 64 << 10;

    struct NoMemory;

    impl BufferAccess for NoMemory {
        fn heap_slice(&self, _: u64, _: u64) -> Option<VolatileSlice<'_>> {
            None
        }
    }

    /// An overlay of data that is emptied, as far as the phase is concerned.
    fn devices(phases: &[Phase]) -> (Devices, std::fs::File) {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; usize::try_from(LENGTH).unwrap()], 0).unwrap();
        let mut devices = Devices::new();
        let role = DeviceRole::Overlay { emptied: true, identity: false };
        let device = Device::new(file.try_clone().unwrap(), true, LENGTH, LENGTH, false).with_role(role);
        devices.attach(OVERLAY, device);
        devices.wipe();
        phases.iter().for_each(|&phase| devices.enter(phase).unwrap());
        (devices, file)
    }

    #[test]
    fn one_flush_is_for_all_that_follow_each_other() {
        let (mut devices, file) = devices(&[Phase::Target, Phase::Overlay]);
        let mut requests = [
            Request::discard(OVERLAY, 4096, 4096),
            Request::discard(OVERLAY, 16384, 4096),
            Request::set_length(OVERLAY, 32768),
        ];
        devices.execute(&NoMemory, &mut requests).unwrap();
        assert!(requests.iter().all(|request| request.status == request_status::OK));
        assert_eq!((devices.stats().overwritten, devices.stats().flushes), (8192 + LENGTH - 32768, 1));
        assert_eq!(file.metadata().unwrap().len(), 32768);
        let mut byte = [0];
        for (at, expected) in [(0, 7), (4096, 0), (8191, 0), (8192, 7), (16384, 0), (20480, 7)] {
            file.read_exact_at(&mut byte, at).unwrap();
            assert_eq!(byte[0], expected, "{at}");
        }
        // What is a hole by now is not written again.
        devices.execute(&NoMemory, &mut [Request::discard(OVERLAY, 4096, 4096)]).unwrap();
        assert_eq!(devices.stats().overwritten, 8192 + LENGTH - 32768);
    }

    #[test]
    fn what_may_not_be_changed_is_not_overwritten() {
        let (mut devices, file) = devices(&[]);
        assert!(devices.execute(&NoMemory, &mut [Request::discard(OVERLAY, 0, 4096)]).is_err());
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!((byte[0], devices.any_changed()), (7, false));
    }

    #[test]
    fn what_is_in_the_way_fails_the_request() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&[7; 4096], 0).unwrap();
        let read_only = std::fs::File::open(file.path()).unwrap();
        let mut devices = Devices::new();
        let role = DeviceRole::Overlay { emptied: true, identity: false };
        devices.attach(OVERLAY, Device::new(read_only, true, 4096, 4096, false).with_role(role));
        devices.wipe();
        for phase in [Phase::Target, Phase::Overlay] {
            devices.enter(phase).unwrap();
        }
        let mut requests = [Request::discard(OVERLAY, 0, 4096), Request::set_length(OVERLAY, 0)];
        devices.execute(&NoMemory, &mut requests).unwrap();
        assert_eq!(requests.map(|request| request.status), [libc::EBADF, request_status::NOT_RUN]);
        assert_eq!(file.as_file().metadata().unwrap().len(), 4096);
    }
}
