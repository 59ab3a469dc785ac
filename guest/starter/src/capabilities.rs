//! What root may do that others may not (`capabilities(7)`), for a process that needs nothing of it.
//!
//! The guest's system calls ask for no capability. They go for the case that a fault of the kernel lets it make another one. Its
//! user stays: where the host may not send signals to another user's processes (`CAP_KILL`), it could not end the guest.

use crate::calls::{call3, number, Errno};

/// The kernel's `struct __user_cap_header_struct` (`linux/capability.h`), version 3.
#[repr(C)]
struct Header {
    version: u32,
    process: i32,
}

/// Its `struct __user_cap_data_struct`, of which version 3 has two: the lower and the upper 32 capabilities.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION: u32 = 0x2008_0522;
/// More than there are: the sets have 64 bits.
const MOST: usize = 64;

/// Give up all capabilities, the chance to get one back, and the groups besides the first. A process that has none does nothing.
///
/// # Errors
/// The kernel refused to take a capability.
pub fn give_up() -> Result<(), Errno> {
    const PR_CAPBSET_DROP: usize = 24;
    const PR_CAP_AMBIENT: usize = 47;
    const PR_CAP_AMBIENT_CLEAR_ALL: usize = 4;
    let header = Header { version: VERSION, process: 0 };
    let mut sets = [Sets::default(); 2];
    // SAFETY: the structures are valid for the calls, and the others have no pointers.
    unsafe {
        let told = call3(number::CAPGET, (&raw const header) as usize, (&raw mut sets) as usize, 0);
        if told.is_ok() && sets == [Sets::default(); 2] {
            return Ok(());
        }
        // These three need capabilities themselves, or a newer kernel. What counts comes last.
        let _ = call3(number::SETGROUPS, 0, 0, 0);
        for capability in 0..MOST {
            if call3(number::PRCTL, PR_CAPBSET_DROP, capability, 0).is_err() {
                break;
            }
        }
        let _ = call3(number::PRCTL, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0);
        let none = [Sets::default(); 2];
        call3(number::CAPSET, (&raw const header) as usize, (&raw const none) as usize, 0).map(drop)
    }
}
