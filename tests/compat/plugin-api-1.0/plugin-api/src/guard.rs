//! The guard around every call into a plugin: a panic becomes an error and never crosses the border.

use crate::{ErrorCode, PluginError};
use std::any::Any;
use std::cell::RefCell;
use std::panic::{catch_unwind, AssertUnwindSafe, PanicHookInfo};

thread_local! {
    /// Text of the last panic of this thread, for the guard to take.
    static LAST_PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Longest text of a panic that is passed on, in bytes.
const TEXT_MAX: usize = 400;

/// Keep panics of this library silent and remember their text. A plugin library has its own standard library and panic hook, so
/// the engine's hook is not affected.
pub fn install_hook() {
    std::panic::set_hook(Box::new(remember));
}

fn remember(info: &PanicHookInfo<'_>) {
    let text = match info.location() {
        Some(place) => format!("{} ({}:{})", payload_text(info.payload()), place.file(), place.line()),
        None => payload_text(info.payload()).to_owned(),
    };
    // During thread exit there is no thread-local storage left: only the text is lost.
    let _ = LAST_PANIC.try_with(|slot| {
        if let Ok(mut slot) = slot.try_borrow_mut() {
            *slot = Some(text);
        }
    });
}

fn payload_text(payload: &(dyn Any + Send)) -> &str {
    if let Some(text) = payload.downcast_ref::<&'static str>() {
        text
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text
    } else {
        "no message"
    }
}

/// Run `call`; a panic in it becomes a [`PluginError`] whose message begins with `plugin panicked`.
///
/// # Errors
/// That of `call`, or the panic.
pub fn guarded<T>(call: impl FnOnce() -> Result<T, PluginError>) -> Result<T, PluginError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result,
        Err(payload) => Err(panicked(payload)),
    }
}

fn panicked(payload: Box<dyn Any + Send>) -> PluginError {
    let remembered = LAST_PANIC.try_with(RefCell::take).ok().flatten();
    let mut text = remembered.unwrap_or_else(|| payload_text(payload.as_ref()).to_owned());
    // Dropping a payload can panic again, outside of any guard.
    std::mem::forget(payload);
    if text.len() > TEXT_MAX {
        let end = (0..=TEXT_MAX).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
        text.truncate(end);
    }
    PluginError::new(ErrorCode::PluginUnavailable, format!("plugin panicked: {text}"))
}
