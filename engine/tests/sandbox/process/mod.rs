//! What only a process has, attacked by a guest that may execute any code: system calls, what is mapped beside the guest, signals, a
//! host that is not alone with the memory. [docs/threat-model.md](../../../../docs/threat-model.md) says which wall each test shows.

mod calls;
mod code;
mod inside;
mod life;
mod machine;
mod memory;
mod random;
mod ring;
mod signals;
mod workers;
