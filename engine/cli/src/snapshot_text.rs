//! Internal snapshots for people, as `qemu-img info` lists them.

use instar::bytes::format_size;
use instar::escape::escape;
use serde_json::Value;
use std::fmt::Write as _;

extern "C" {
    /// `tzset(3)`.
    fn tzset();
}

/// Read the time zone: once the process is confined, its file cannot be opened any more.
pub(super) fn prepare() {
    // SAFETY: takes nothing; it is called while there is one thread, so nobody changes the environment meanwhile.
    unsafe { tzset() };
}

/// The list, with its heading.
pub(super) fn human(snapshots: &[Value]) -> String {
    let mut text = String::from("Snapshot list:\n");
    line(&mut text, ["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]);
    for snapshot in snapshots {
        let name = |key: &str| escape(snapshot.get(key).and_then(Value::as_str).unwrap_or_default());
        let number = |key: &str| snapshot.get(key).and_then(Value::as_u64);
        let size = format_size(number("vm-state-size").unwrap_or(0));
        let date = date(number("date-sec").unwrap_or(0));
        let clock = clock(number("vm-clock-sec").unwrap_or(0), number("vm-clock-nsec").unwrap_or(0));
        let count = number("icount").map(|count| count.to_string()).unwrap_or_default();
        line(&mut text, [&name("id"), &name("name"), &size, &date, &clock, &count]);
    }
    text
}

/// In the columns of `qemu-img`.
fn line(text: &mut String, [id, tag, size, date, clock, count]: [&str; 6]) {
    // Writing into a string cannot fail.
    let _ = writeln!(text, "{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {count:>10}");
}

/// Hours, minutes, seconds and milliseconds.
fn clock(seconds: u64, nanoseconds: u64) -> String {
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!("{hours:04}:{minutes:02}:{:02}.{:03}", seconds % 60, nanoseconds / 1_000_000)
}

/// Seconds since 1970 as date and time of this place.
fn date(seconds: u64) -> String {
    let Ok(seconds) = libc::time_t::try_from(seconds) else { return String::new() };
    // SAFETY: `tm` is a C structure of integers and a pointer, for which zero is a value.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are valid for the call, which keeps none of them.
    if unsafe { libc::localtime_r(&raw const seconds, &raw mut tm) }.is_null() {
        return String::new();
    }
    let (year, month) = (i64::from(tm.tm_year) + 1900, tm.tm_mon + 1);
    format!("{year:04}-{month:02}-{:02} {:02}:{:02}:{:02}", tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec)
}
