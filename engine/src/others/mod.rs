//! Images that the operator has not named, but that depend on those of an operation: the operator decides about them.

mod children;
mod siblings;

pub use children::refuse_children;
pub use siblings::Siblings;
