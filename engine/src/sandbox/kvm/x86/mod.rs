//! What a virtual machine of x86 needs: page tables, descriptor tables and fault stubs, registers.

pub mod fault;
pub mod interrupts;
pub mod pages;
pub mod processor;
pub mod system;
pub mod vcpu;
