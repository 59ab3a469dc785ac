//! The trait that a plugin author implements.

use crate::{
    BitmapFacts, Context, CreateSpec, CreatedImage, ErrorCode, Footprint, GuestModule, ImageFacts, ImageFile,
    ImageReader, PluginError, Role, Verdict,
};

/// Score of [`FormatPlugin::probe`]: not an image of this format.
pub const PROBE_NO: u32 = 0;
/// Score of [`FormatPlugin::probe`] for a format without a mark of its own (raw): any bytes are an image of it.
/// The engine takes such a format only when the operator, or a trusted header, names it.
pub const PROBE_ANYTHING: u32 = 1;
/// Score of [`FormatPlugin::probe`]: the mark of the format is there, but it is short or may stand in other files.
pub const PROBE_LIKELY: u32 = 50;
/// Score of [`FormatPlugin::probe`]: the mark of the format is there. A damaged header does not lower the
/// score: `facts` says what is wrong with it.
pub const PROBE_CERTAIN: u32 = 100;

/// The host half of a plugin. See the crate's documentation for what an implementation may do.
pub trait FormatPlugin: 'static {
    /// Name of the format, as in `-f NAME` and in the backing format that images record: lower-case ASCII letters,
    /// digits, `-` and `_`, beginning with a letter, at most 31 bytes.
    const NAME: &'static str;
    /// One line for people.
    const DESCRIPTION: &'static str;
    /// Version of the plugin itself, usually `env!("CARGO_PKG_VERSION")`.
    const VERSION: &'static str;
    /// Other names that the format is known by; the same rules as for [`NAME`](Self::NAME).
    const ALIASES: &'static [&'static str] = &[];
    /// Usual file name extensions, without the dot. For people only: nothing is recognised by its name.
    const EXTENSIONS: &'static [&'static str] = &[];
    /// Options of [`create`](Self::create) as name and one line of help. Empty for a plugin that cannot create.
    const CREATE_OPTIONS: &'static [(&'static str, &'static str)] = &[];
    /// Whether [`create`](Self::create) is implemented.
    const CAN_CREATE: bool = false;

    /// How sure the plugin is that the image is of its format: [`PROBE_NO`] (0) to [`PROBE_CERTAIN`] (100).
    ///
    /// # Errors
    /// Only when reading fails. An image that is too short for a header is [`PROBE_NO`].
    fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError>;

    /// The files that the image consists of besides the one that it is named by, in an order that the guest half knows, too:
    /// each becomes a device of its own. The engine opens them, if their names lead where names in images may lead, before
    /// it asks for the facts of an image whose content matters. Called under the same condition as `facts`.
    ///
    /// # Errors
    /// As [`facts`](Self::facts).
    fn files(_image: &ImageReader<'_>) -> Result<Vec<ImageFile>, PluginError> {
        Ok(Vec::new())
    }

    /// What the header says. Only where the engine opened them, the [other files](Self::files) can be
    /// [read](ImageReader::file): `instar info` looks at the one alone. The engine calls this only when `probe` did not say [`PROBE_NO`].
    ///
    /// # Errors
    /// [`ErrorCode::ParseFailed`] for a header that makes no sense, [`ErrorCode::UnsupportedFormat`] for one that is
    /// too new to be understood. A feature that can be *shown* but not worked with is a fact, refused by `verdict`.
    fn facts(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError>;

    /// Whether the image with the facts `own` may take the part `role` in an operation, of which `context` says as much as
    /// may matter: what the image is backed by, and what may arrive at it. Which operation it is, and of which formats the other
    /// images are, does not.
    ///
    /// For [`Role::Write`], [`Verdict::max_length`] bounds how long the file may become if everything
    /// [arrives](Context::arriving). For [`Role::Empty`] it is 0, unless the file has to become longer before it can be
    /// emptied.
    fn verdict(role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict;

    /// The identity that the image with the facts `own` gets when something is written into it from what is above it, whose
    /// lowest image has the facts `child`; empty if it keeps the one that it has. At most
    /// [`IDENTITY_MAX`](crate::IDENTITY_MAX) bytes.
    ///
    /// It follows from both, so that an operation that was interrupted between the two images finds the same one again. From
    /// the child's [`identity`](ImageFacts::identity), too: two copies of an image that each got another child's content have
    /// different ones. The guest half comes to the same ([`Sink::next_identity`] in the guest's SDK). `child` may be of
    /// another format.
    ///
    /// None by default.
    ///
    /// [`Sink::next_identity`]: https://docs.rs/instar-guest-sdk
    fn next_identity(_own: &ImageFacts, _child: &ImageFacts) -> Vec<u8> {
        Vec::new()
    }

    /// What a person should know of the image that the other facts do not say: what an operation would do to it, what keeps it
    /// from being worked with, what is odd about it. One line each, without a final stop; 16 of them at most, of 300 bytes at
    /// most. The engine prints them. `facts` are those that [`facts`](Self::facts) gave for this image.
    ///
    /// None by default.
    ///
    /// # Errors
    /// As [`facts`](Self::facts). It is printed in place of the notes, and nothing fails for it.
    fn notes(_image: &ImageReader<'_>, _facts: &ImageFacts) -> Result<Vec<String>, PluginError> {
        Ok(Vec::new())
    }

    /// The guest half.
    fn guest_module() -> GuestModule;

    /// A new, empty image.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] for an option that is unknown (name it, and the ones there are) or a
    /// value that makes no sense.
    fn create(_spec: &CreateSpec) -> Result<CreatedImage, PluginError> {
        Err(PluginError::new(ErrorCode::NotImplemented, format!("the {} plugin cannot create images", Self::NAME)))
    }

    /// How much room an image would take that [`create`](Self::create) makes for the same `spec`, whose name may be empty, and
    /// that gets these persistent bitmaps afterwards. Nothing is made.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    fn measure(_spec: &CreateSpec, _bitmaps: &[BitmapFacts]) -> Result<Footprint, PluginError> {
        Err(PluginError::new(ErrorCode::NotImplemented, format!("the {} plugin cannot measure images", Self::NAME)))
    }
}
