//! The one message that is encoded by hand: a panic may mean that there is no heap.

/// Encode `GuestMessage { panic: PanicMessage { text, address } }` into `out`; returns the length. Text that does not fit is
/// cut at a character boundary; 0 if `out` is too short for any text.
pub fn encode_panic(text: &str, address: u64, out: &mut [u8]) -> usize {
    // Two tags with lengths of at most three bytes, and the address with its tag.
    const HEADERS: usize = 8 + 11;
    const OUTER_TAG: u8 = 4 << 3 | 2;
    const INNER_TAG: u8 = 1 << 3 | 2;
    const ADDRESS_TAG: u8 = 2 << 3;
    let room = out.len().saturating_sub(HEADERS).min(0x3fff - HEADERS);
    let mut length = text.len().min(room);
    while !text.is_char_boundary(length) {
        length -= 1;
    }
    if length == 0 {
        return 0;
    }
    let mut at = 0;
    let mut put = |byte: u8| {
        if let Some(slot) = out.get_mut(at) {
            *slot = byte;
            at += 1;
        }
    };
    let inner_header = 1 + varint_length(length);
    let address = usize::try_from(address).unwrap_or(0);
    let place = if address == 0 { 0 } else { 1 + varint_length(address) };
    put(OUTER_TAG);
    varint(length + inner_header + place, &mut put);
    put(INNER_TAG);
    varint(length, &mut put);
    text.as_bytes().iter().take(length).for_each(|&byte| put(byte));
    if address != 0 {
        put(ADDRESS_TAG);
        varint(address, &mut put);
    }
    at
}

fn varint_length(value: usize) -> usize {
    let mut length = 0;
    varint(value, &mut |_| length += 1);
    length
}

fn varint(mut value: usize, put: &mut impl FnMut(u8)) {
    loop {
        let low = value.to_le_bytes()[0] & 0x7f;
        value >>= 7;
        put(if value == 0 { low } else { low | 0x80 });
        if value == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    extern crate std;
    use super::*;
    use instar_guest_protocol::{guest_message::Kind, GuestMessage, Message};

    fn decoded(text: &str, room: usize) -> std::string::String {
        let mut out = std::vec![0; room];
        for address in [0, 0x10_1234, u64::MAX] {
            let length = encode_panic(text, address, &mut out);
            let Some(Kind::Panic(panic)) = GuestMessage::decode(&out[..length]).unwrap().kind else { unreachable!() };
            assert_eq!(panic.address, address);
        }
        let length = encode_panic(text, 7, &mut out);
        match GuestMessage::decode(&out[..length]).unwrap().kind {
            Some(Kind::Panic(panic)) => panic.text,
            other => std::format!("{other:?}"),
        }
    }

    #[test]
    fn it_is_what_prost_encodes() {
        for length in [1, 5, 100, 120, 127, 128, 200, 1000] {
            let text = "x".repeat(length);
            assert_eq!(decoded(&text, 0x4000), text);
        }
    }

    #[test]
    fn long_text_is_cut_at_a_character() {
        assert_eq!(decoded("äääää", 19 + 5), "ää");
        assert_eq!(decoded(&"y".repeat(100_000), 0x4000).len(), 0x3fff - 19);
        assert_eq!(encode_panic("text", 1, &mut [0; 3]), 0);
        assert_eq!(encode_panic("", 1, &mut [0; 30]), 0);
    }
}
