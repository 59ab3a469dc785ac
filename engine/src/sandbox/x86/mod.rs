//! What every sandbox on x86-64 has in common: the faults of the processor.

pub mod fault;
