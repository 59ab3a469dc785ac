//! What a guest may do with its memory.

/// What may be done with a page. Reading is always allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// Ring 3 may reach it.
    pub user: bool,
    /// It may be written.
    pub write: bool,
    /// It may be executed.
    pub execute: bool,
}

impl Rights {
    /// Constants of ring 3.
    pub const READ: Self = Self { user: true, write: false, execute: false };
    /// Data of ring 3.
    pub const DATA: Self = Self { user: true, write: true, execute: false };
    /// Code of ring 3.
    #[cfg(test)]
    pub const CODE: Self = Self { user: true, write: false, execute: true };
    /// Tables of the supervisor.
    pub const SYSTEM_READ: Self = Self { user: false, write: false, execute: false };
    /// The supervisor's stack.
    pub const SYSTEM_DATA: Self = Self { user: false, write: true, execute: false };
    /// The supervisor's fault stubs.
    pub const SYSTEM_CODE: Self = Self { user: false, write: false, execute: true };
}
