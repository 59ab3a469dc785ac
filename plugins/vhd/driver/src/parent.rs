//! Another parent for a differencing disk, in an order that every crash survives.
//!
//! Identity and names stand in the dynamic header, which has two sectors, and in locators elsewhere: a header that is in use is
//! never written. Instead
//!
//! 1. the new names and a new header are written behind the end of the file, with the footer behind them, and made durable. The
//!    copy of the footer in front counts while the one at the end is not there;
//! 2. both copies of the footer name the new header, first the one at the end, durably, then the one in front. Either of them is
//!    one sector, and each names a header that is whole, whichever copy a program believes. Once the one in front, which counts
//!    here, has the new parent, nobody finds the old one: a second run may take it for done;
//! 3. the new names and the header are written over the old ones, which nobody refers to any more, and made durable;
//! 4. both copies of the footer name the header at its old place again;
//! 5. the file is cut to the length that it had.
//!
//! So the image keeps the layout that the program gave it which made it: some allocate blocks behind the table and the last
//! block, and would write over a header there (QEMU, `vpc_open`). Names that are longer than the old ones were do not fit
//! there: then the image stays as the second step leaves it.

use crate::image::{Image, Metadata, LOCATOR};
use alloc::vec::Vec;
use instar_guest_sdk::abi::{ErrorCode, PARENT_ROOM};
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, OrderedWriter, Parent};
use instar_vhd_format::{codes, creators, Header, Name, FOOTER_BYTES, HEADER_BYTES, SECTOR};

/// A parent that the image can record.
#[derive(Debug)]
pub struct NewParent {
    parent: instar_vhd_format::Parent,
    names: Vec<Name>,
    /// Where the names and the header go at first, in bytes.
    place: u64,
}

impl Image {
    /// What [`Source::plan_parent`](instar_guest_sdk::Source::plan_parent) refuses of this image, in one clause.
    fn refused(&self, text: impl Into<alloc::string::String>) -> DriverError {
        let place = self.footers.footer.data_offset();
        DriverError::new(ErrorCode::UnsupportedFormat, text).at(self.device, place)
    }

    /// See [`Source::plan_parent`](instar_guest_sdk::Source::plan_parent).
    pub fn plan_parent(&self, io: &mut dyn BlockIo, parent: Option<&Parent<'_>>) -> DriverResult<NewParent> {
        if !self.has_parent() {
            return Err(self.refused("it has no parent that could be another one"));
        }
        let parent = parent.ok_or_else(|| {
            self.refused("a differencing VHD cannot be without a parent: commit it into its present one")
        })?;
        let (path, id) = parent.of_format("vpc", self.size).map_err(|error| self.refused(error.text))?;
        let new = instar_vhd_format::Parent { id, path: path.into() };
        // The names of Windows are always there; that of XenServer only where it looks for it.
        let url = self.footers.footer.creator() == creators::XEN
            || self.header.locators().any(|locator| locator.code == codes::MACX);
        let names = new.names(url).map_err(|error| self.refused(error.text))?;
        let survey = self.survey(io, &mut |offset, text| Err(self.corrupt(offset, text)))?;
        let room = names.iter().map(Name::room).sum::<u64>() + HEADER_BYTES as u64;
        let footer = FOOTER_BYTES as u64;
        // The last block of a file may be truncated, but still owns the rest of its place.
        let (place, end) = if self.fixed_length {
            (survey.end, self.file_length.saturating_sub(footer).min(self.data_end()))
        } else {
            let end = self.file_length.saturating_add(PARENT_ROOM).saturating_sub(footer);
            (self.file_length.next_multiple_of(SECTOR).max(survey.end), end)
        };
        if place.checked_add(room).is_none_or(|needed| needed > end) {
            let text = alloc::format!(
                "there is no room behind its last block for {room} bytes about the new parent: commit it into its present \
                 parent first"
            );
            return Err(self.refused(text));
        }
        Ok(NewParent { parent: new, names, place })
    }

    /// See [`Source::set_parent`](instar_guest_sdk::Source::set_parent).
    pub fn set_parent(&mut self, io: &mut dyn BlockIo, new: &NewParent) -> DriverResult<()> {
        let mut out = OrderedWriter::new(self.device);
        let old = self.footers.footer;
        if !self.footers.head {
            // The one at the end is the only copy, and is not at the end while the file becomes longer.
            out.write(io, 0, &old.encode())?;
            out.barrier(io)?;
            self.footers.head = true;
        }
        let (home, data_end) = (old.data_offset(), self.data_end());
        let homes = self.homes(&new.names);

        // Step 1.
        let mut at = new.place;
        let mut places = Vec::new();
        for name in &new.names {
            places.push(at);
            at = at.checked_add(name.room()).ok_or_else(|| overflow("a parent locator"))?;
        }
        let header = self.put_parent(io, &mut out, new, (&places, at))?;
        if !self.fixed_length {
            let end = at.checked_add(HEADER_BYTES as u64).ok_or_else(|| overflow("the dynamic header"))?;
            out.write(io, end, &old.encode())?;
            self.footers.tail = Some((end, true));
            self.file_length = end.checked_add(FOOTER_BYTES as u64).ok_or_else(|| overflow("the file"))?;
        }
        out.barrier(io)?;

        // Step 2.
        self.name_header(io, &mut out, header, at)?;
        let Some(homes) = homes else { return Ok(()) };

        // Steps 3 and 4.
        let header = self.put_parent(io, &mut out, new, (&homes, home))?;
        out.barrier(io)?;
        self.name_header(io, &mut out, header, home)?;

        // Step 5.
        if !self.fixed_length {
            self.cut(io, &mut out, data_end.next_multiple_of(SECTOR))?;
        }
        out.barrier(io)
    }

    /// Places for all of the names where the old ones stand, which nothing else overlaps; `None` if they do not fit.
    fn homes(&self, names: &[Name]) -> Option<Vec<u64>> {
        let mut old: Vec<_> = self.metadata().into_iter().filter(|(_, what)| *what == LOCATOR).collect();
        let mut homes = Vec::new();
        for name in names {
            let fits = |(range, _): &Metadata| range.start % SECTOR == 0 && range.end - range.start >= name.room();
            homes.push(old.swap_remove(old.iter().position(fits)?).0.start);
        }
        Some(homes)
    }

    /// Write the names at `places`, and a header that names them at byte `at`.
    fn put_parent(
        &self,
        io: &mut dyn BlockIo,
        out: &mut OrderedWriter,
        new: &NewParent,
        (places, at): (&[u64], u64),
    ) -> DriverResult<Header> {
        let mut locators = Vec::new();
        for (name, place) in new.names.iter().zip(places) {
            let mut bytes = name.bytes.clone();
            bytes.resize(usize::try_from(name.room()).map_err(|_| overflow("a parent locator"))?, 0);
            out.write(io, *place, &bytes)?;
            locators.push(name.at(*place));
        }
        let header = self.header.with_parent(&new.parent, &locators);
        out.write(io, at, &header.encode())?;
        Ok(header)
    }

    /// Have both copies of the footer name the header at byte `at`, durably, the one in front last. A crash leaves two that
    /// differ in that.
    fn name_header(
        &mut self,
        io: &mut dyn BlockIo,
        out: &mut OrderedWriter,
        header: Header,
        at: u64,
    ) -> DriverResult<()> {
        let footer = self.footers.footer.with_data_offset(at);
        if let Some((offset, _)) = self.footers.tail {
            out.write(io, offset, &footer.encode())?;
            out.barrier(io)?;
            self.footers.tail = Some((offset, true));
        }
        out.write(io, 0, &footer.encode())?;
        out.barrier(io)?;
        (self.footers.footer, self.header) = (footer, header);
        self.take_metadata();
        Ok(())
    }
}
