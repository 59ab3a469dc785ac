//! Compressed clusters: a raw deflate stream that fills a cluster (`decompress_buffer`).

use zlib_rs::{Inflate, InflateFlush};

/// Any window that deflate has: 32 KiB.
const WINDOW_BITS: u8 = 15;

/// A decoder with its memory, which is used again for every cluster.
pub struct Inflater(Inflate);

impl Default for Inflater {
    fn default() -> Self {
        Self(Inflate::new(false, WINDOW_BITS))
    }
}

impl core::fmt::Debug for Inflater {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Inflater")
    }
}

impl Inflater {
    /// Decode the stream in `input` into `output`, which is a cluster long. As in QEMU a cluster is good as soon as it is
    /// full, with or without the mark of the stream's end.
    ///
    /// # Errors
    /// A clause on the stream; then the content of `output` is arbitrary.
    pub fn decode(&mut self, input: &[u8], output: &mut [u8]) -> Result<(), &'static str> {
        self.0.reset(false);
        self.0.decompress(input, output, InflateFlush::Finish).map_err(|_| "does not decode")?;
        if self.0.total_out() == output.len() as u64 {
            Ok(())
        } else {
            Err("decodes to less than a cluster")
        }
    }
}

/// Decode one cluster with a decoder of its own: see [`Inflater::decode`].
///
/// # Errors
/// As there.
pub fn inflate(input: &[u8], output: &mut [u8]) -> Result<(), &'static str> {
    Inflater::default().decode(input, output)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use miniz_oxide::deflate::compress_to_vec;

    #[test]
    fn a_stream_fills_its_cluster_or_is_refused() {
        let stream = compress_to_vec(&[7; 4096], 9);
        let mut cluster = vec![0; 4096];
        assert_eq!(inflate(&stream, &mut cluster), Ok(()));
        assert_eq!(cluster, [7; 4096]);
        let followed = [&stream[..], b"something else"].concat();
        assert_eq!(inflate(&followed, &mut cluster), Ok(()));
        assert_eq!(inflate(&stream, &mut [0; 512]), Ok(()), "full before the stream ends");
        assert_eq!(inflate(&stream, &mut [0; 4097]), Err("decodes to less than a cluster"));
        assert_eq!(inflate(&[], &mut cluster), Err("decodes to less than a cluster"));
        assert_eq!(inflate(&[0xff; 64], &mut cluster), Err("does not decode"));
    }
}
