//! A map as a picture: a strip of the disk for each layer, which shows where the bytes come from that a guest reads.

use super::color::Paint;
use super::output::{print, unprinted};
use super::paragraph::{filled, Indent};
use instar::bytes::format_size;
use instar::error::Error;
use instar::escape::escape_path;
use instar::map::MapRun;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write;
use std::path::PathBuf;

/// Columns of a strip: with its frame it fits into 80 …
const COLUMNS: usize = 72;
/// … and at least that many on a narrow terminal.
const FEWEST: usize = 8;
/// Cells that are counted. How long the disk is shows only at its end: when it does not fit any more, every cell takes in the
/// next one.
const CELLS: usize = 64 * COLUMNS;
/// Bytes of the first cells: a sector.
const SECTOR: u64 = 512;
/// Of an SVG, in pixels: a column, a strip, a strip with its name and what is between two.
const WIDTH: usize = 10;
const HEIGHT: usize = 24;
const PITCH: usize = 56;

/// How a picture is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Drawing {
    /// With characters, for a terminal
    Text,
    /// As an SVG
    Svg,
}

/// What a part of the disk reads from a layer, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cell {
    data: u64,
    zero: u64,
}

/// What all of the disk reads from a layer.
#[derive(Debug)]
struct Strip {
    name: PathBuf,
    cells: Vec<Cell>,
}

/// Counts runs, and draws them at the end.
#[derive(Debug)]
pub struct MapPicture {
    drawing: Drawing,
    paint: Paint,
    /// Columns of the terminal, if there is one.
    width: Option<usize>,
    /// Columns of a strip.
    across: usize,
    /// Where the picture begins, and where the last run ended, in guest bytes.
    start: u64,
    end: u64,
    /// Bytes of a cell.
    unit: u64,
    /// By depth.
    strips: BTreeMap<u32, Strip>,
}

impl MapPicture {
    /// A picture of what comes from this byte of the disk on.
    pub fn new(drawing: Drawing, start: u64, paint: Paint, width: Option<usize>) -> Self {
        let across = match (drawing, width) {
            (Drawing::Text, Some(width)) => width.saturating_sub(2).clamp(FEWEST, COLUMNS),
            _ => COLUMNS,
        };
        Self { drawing, paint, width, across, start, end: start, unit: SECTOR, strips: BTreeMap::new() }
    }

    /// Count the next run.
    pub fn add(&mut self, run: &MapRun<'_>) {
        self.end = run.start.saturating_add(run.length);
        while self.length() > self.unit.saturating_mul(CELLS as u64) {
            self.unit = self.unit.saturating_mul(2);
            self.strips.values_mut().for_each(Strip::halve);
        }
        if !run.present {
            return;
        }
        let (unit, end) = (self.unit, self.length());
        let strip = self
            .strips
            .entry(run.depth)
            .or_insert_with(|| Strip { name: run.layer.to_owned(), cells: vec![Cell::default(); CELLS] });
        let mut at = run.start.saturating_sub(self.start);
        while at < end {
            let index = usize::try_from(at / unit).unwrap_or(usize::MAX);
            let next = (at - at % unit).saturating_add(unit).min(end);
            if let Some(cell) = strip.cells.get_mut(index) {
                *(if run.zero { &mut cell.zero } else { &mut cell.data }) += next - at;
            }
            at = next;
        }
    }

    /// Print it.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn end(&self, out: &mut dyn Write) -> Result<(), Error> {
        let picture = match self.drawing {
            Drawing::Text => self.text(),
            Drawing::Svg => self.svg(),
        };
        print(out, &picture).and_then(|()| out.flush().map_err(|error| unprinted(&error)))
    }

    /// Bytes of the disk in the picture.
    fn length(&self) -> u64 {
        self.end - self.start
    }

    /// How many cells the disk takes, and how many of them a column. A short disk has fewer columns than there may be.
    fn grid(&self) -> (usize, usize) {
        let cells = usize::try_from(self.length().div_ceil(self.unit)).map_or(CELLS, |cells| cells.clamp(1, CELLS));
        (cells, cells.div_ceil(self.across))
    }

    /// Bytes of a column.
    fn column(&self) -> u64 {
        (self.grid().1 as u64).saturating_mul(self.unit)
    }

    /// What each column of a strip shows.
    fn columns(&self, strip: &Strip) -> Vec<Cell> {
        let (cells, group) = self.grid();
        strip.cells[..cells].chunks(group).map(Cell::sum).collect()
    }

    fn heading(&self) -> String {
        let (length, column) = (format_size(self.length()), format_size(self.column()));
        let from = if self.start == 0 { String::new() } else { format!(" from byte {} on", self.start) };
        format!("{length} of the disk{from}, {column} a column")
    }

    fn text(&self) -> String {
        let legend = format!("{}: # data, + partly data, . zeroes", self.heading());
        let mut text = filled(&legend, Indent::default(), self.width) + "\n";
        for (depth, strip) in &self.strips {
            let column = self.column();
            let line: String = self.columns(strip).iter().map(|cell| cell.character(column)).collect();
            let label = filled(&strip.label(*depth), Indent { first: "", rest: "  " }, self.width);
            let label: Vec<String> = label.lines().map(|line| self.paint.heading(line)).collect();
            let _ = writeln!(text, "{}\n|{}|", label.join("\n"), self.colored(&line));
        }
        text
    }

    /// A strip of characters, in which runs of the same one have its color.
    fn colored(&self, line: &str) -> String {
        let runs = line.as_bytes().chunk_by(|left, right| left == right).map(String::from_utf8_lossy);
        runs.map(|run| match run.as_bytes().first() {
            Some(b'#') => self.paint.data(&run),
            Some(b'+') => self.paint.label(&run),
            Some(b'.') => self.paint.faint(&run),
            _ => run.into_owned(),
        })
        .collect()
    }

    fn svg(&self) -> String {
        let (width, height) = (COLUMNS * WIDTH, PITCH * (self.strips.len() + 1));
        let mut text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" \
             font-size=\"13\">\n<text x=\"0\" y=\"16\">{}</text>\n",
            escape_xml(&self.heading())
        );
        for (row, (depth, strip)) in (0..).zip(&self.strips) {
            let top = PITCH * row + PITCH / 2;
            let (column, cells) = (self.column(), self.columns(strip));
            let width = cells.len() * WIDTH;
            let (baseline, strip_top) = (top + 16, top + 24);
            let _ = writeln!(text, "<text x=\"0\" y=\"{baseline}\">{}</text>", escape_xml(&strip.label(*depth)));
            let _ = writeln!(
                text,
                "<rect x=\"0\" y=\"{strip_top}\" width=\"{width}\" height=\"{HEIGHT}\" fill=\"none\" stroke=\"#888\"/>"
            );
            for (index, cell) in cells.iter().enumerate().filter(|(_, cell)| **cell != Cell::default()) {
                let (fill, opacity) = cell.paint(column);
                let _ = writeln!(
                    text,
                    "<rect x=\"{}\" y=\"{strip_top}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"{fill}\" \
                     fill-opacity=\"{opacity:.2}\"/>",
                    index * WIDTH
                );
            }
        }
        text.push_str("</svg>\n");
        text
    }
}

impl Strip {
    /// Each cell takes in the next one.
    fn halve(&mut self) {
        self.cells = self.cells.chunks(2).map(Cell::sum).collect();
        self.cells.resize(CELLS, Cell::default());
    }

    fn label(&self, depth: u32) -> String {
        let Cell { data, zero } = Cell::sum(&self.cells);
        let zeroes = if zero == 0 { String::new() } else { format!(", {} of zeroes", format_size(zero)) };
        format!("{depth} {}: {} of data{zeroes}", escape_path(&self.name), format_size(data))
    }
}

impl Cell {
    fn sum(cells: &[Self]) -> Self {
        let add = |sum: Self, cell: &Self| Self {
            data: sum.data.saturating_add(cell.data),
            zero: sum.zero.saturating_add(cell.zero),
        };
        cells.iter().fold(Self::default(), add)
    }

    /// As one character of a strip.
    fn character(self, column: u64) -> char {
        match self {
            Self { data: 0, zero: 0 } => ' ',
            Self { data: 0, .. } => '.',
            // Most of it: the last column may be cut short.
            Self { data, .. } if data >= column - column / 8 => '#',
            Self { .. } => '+',
        }
    }

    /// The color of a column, and how much of it: a little can be seen, too.
    fn paint(self, column: u64) -> (&'static str, f64) {
        #[allow(clippy::cast_precision_loss, reason = "a shade")]
        let share = |bytes: u64| 0.15 + 0.85 * (bytes as f64 / column.max(1) as f64).min(1.0);
        match self.data {
            0 => ("#bbb", share(self.zero)),
            data => ("#2a6fb0", share(data)),
        }
    }
}

/// Text of an SVG.
fn escape_xml(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const MIB: u64 = 1 << 20;

    fn run(start: u64, length: u64, depth: u32, kind: &str) -> MapRun<'static> {
        let (present, zero) = (kind != "none", kind != "data");
        let layer = Path::new(if depth == 0 { "top<1>" } else { "base" });
        MapRun { start, length, depth, present, zero, data: !zero, compressed: false, offset: None, file: None, layer }
    }

    fn picture_in(width: Option<usize>, drawing: Drawing, runs: &[MapRun<'_>]) -> String {
        let mut picture = MapPicture::new(drawing, runs.first().map_or(0, |run| run.start), Paint::PLAIN, width);
        runs.iter().for_each(|run| picture.add(run));
        let mut out = Vec::new();
        assert!(picture.end(&mut out).is_ok());
        String::from_utf8_lossy(&out).into_owned()
    }

    fn picture(drawing: Drawing, runs: &[MapRun<'_>]) -> String {
        picture_in(None, drawing, runs)
    }

    #[test]
    fn a_narrow_terminal_has_fewer_columns() {
        let runs = [run(0, 18 * MIB, 1, "data"), run(18 * MIB, 54 * MIB, 1, "zero")];
        assert_eq!(
            picture_in(Some(20), Drawing::Text, &runs),
            "72 MiB of the disk,\n4 MiB a column: #\ndata, + partly data,\n. zeroes\n1 base: 18 MiB of\n  data, 54 MiB of\n  \
             zeroes\n|####+.............|\n"
        );
        for (width, strip) in [(None, 72), (Some(300), 72), (Some(74), 72), (Some(73), 71), (Some(10), 8), (Some(1), 8)]
        {
            let longest = |text: String| text.lines().filter(|line| line.starts_with('|')).map(str::len).max();
            assert!(longest(picture_in(width, Drawing::Text, &runs)) <= Some(strip + 2), "{width:?}");
        }
        assert_eq!(picture_in(Some(20), Drawing::Svg, &runs), picture(Drawing::Svg, &runs));
    }

    #[test]
    fn each_layer_is_a_strip() {
        let runs = [
            run(0, 18 * MIB, 1, "data"),
            run(18 * MIB, 18 * MIB, 0, "zero"),
            run(36 * MIB, MIB / 2, 0, "data"),
            run(73 * MIB / 2, 71 * MIB / 2, 1, "none"),
        ];
        let strip = |column: char, count: usize| column.to_string().repeat(count);
        assert_eq!(
            picture(Drawing::Text, &runs),
            format!(
                "72 MiB of the disk, 1 MiB a column: # data, + partly data, . zeroes\n0 top<1>: 512 KiB of data, 18 MiB of \
                 zeroes\n|{}{}+{}|\n1 base: 18 MiB of data\n|{}{}|\n",
                strip(' ', 18),
                strip('.', 18),
                strip(' ', 35),
                strip('#', 18),
                strip(' ', 54)
            )
        );
        let svg = picture(Drawing::Svg, &runs);
        assert!(svg.contains("0 top&lt;1&gt;: 512 KiB") && svg.ends_with("</svg>\n"), "{svg}");
        // The frames, 18 columns of zeroes, one and 18 of data.
        assert_eq!(svg.matches("<rect").count(), 2 + 18 + 1 + 18);
    }

    #[test]
    fn any_length_fits() {
        for length in [1, 511, 512, 513, MIB - 512, MIB, 5 * MIB + 512, 1 << 40, 1 << 63, u64::MAX - 512] {
            let text = picture(Drawing::Text, &[run(512, length, 0, "data")]);
            let strip = text.lines().nth(2).unwrap_or_default();
            assert!((3..=COLUMNS + 2).contains(&strip.len()), "{length}: {text}");
            let full = &strip[1..strip.len() - 1];
            assert!(full[..full.len() - 1].chars().all(|column| column == '#'), "{length}: {text}");
        }
        assert_eq!(picture(Drawing::Text, &[]).lines().count(), 1);
    }
}
