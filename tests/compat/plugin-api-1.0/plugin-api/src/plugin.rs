//! The trait that a plugin author implements.

use crate::{
    BitmapFacts, Context, CreateSpec, CreatedImage, ErrorCode, Footprint, GuestModule, ImageFacts, ImageFile,
    ImageReader, PluginError, Role, Verdict,
};

/// Score of [`FormatPlugin::probe`]: not an image of this format.
pub const PROBE_NO: u32 = 0;
/// Score of [`FormatPlugin::probe`] for a format without a signature (raw): any bytes are an image of it. The engine uses such
/// a format only if the operator, or a trusted header, names it.
pub const PROBE_ANYTHING: u32 = 1;
/// Score of [`FormatPlugin::probe`]: the image has the signature of the format, but it is short or occurs in other files.
pub const PROBE_LIKELY: u32 = 50;
/// Score of [`FormatPlugin::probe`]: the image has the signature of the format. A damaged header does not lower the score:
/// `facts` reports the damage.
pub const PROBE_CERTAIN: u32 = 100;

/// The host half of a plugin. See the crate's documentation for what an implementation may do.
///
/// # Example
///
/// A format that can only be looked at: a header of 16 bytes holds the signature and the size of the disk.
///
/// ```
/// use instar_plugin_api::{
///     Context, ErrorCode, FormatPlugin, GuestModule, ImageFacts, ImageReader, PluginError, Role, Verdict, PROBE_CERTAIN, PROBE_NO,
/// };
///
/// struct Slate;
///
/// impl FormatPlugin for Slate {
///     const NAME: &'static str = "slate";
///     const DESCRIPTION: &'static str = "slate disk image";
///     const VERSION: &'static str = "0.1.0";
///
///     fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
///         Ok(if image.read_vec(0, 8)? == b"SLATE\0\0\x01" { PROBE_CERTAIN } else { PROBE_NO })
///     }
///
///     fn facts(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
///         let mut size = [0; 8];
///         image.read_exact_at(8, &mut size)?;
///         match u64::from_le_bytes(size) {
///             0 => Err(PluginError::new(ErrorCode::ParseFailed, "the size of the disk is 0")),
///             size => Ok(ImageFacts::new(Self::NAME, size, 65536, image.length())),
///         }
///     }
///
///     fn verdict(_: Role, _: &ImageFacts, _: &Context<'_>) -> Verdict {
///         Verdict::refused(ErrorCode::UnsupportedFormat, "slate images can only be looked at")
///     }
///
///     fn guest_module() -> GuestModule {
///         // A real plugin embeds the ELF that its build script linked.
///         GuestModule::source_only(b"\x7fELF")
///     }
/// }
///
/// let header = [b"SLATE\0\0\x01".as_slice(), &(1u64 << 30).to_le_bytes()].concat();
/// let image = ImageReader::new(16, &header);
/// assert_eq!(Slate::probe(&image).ok(), Some(PROBE_CERTAIN));
/// assert_eq!(Slate::facts(&image).ok().map(|facts| facts.virtual_size), Some(1 << 30));
/// ```
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
    /// Usual file name extensions, without the dot. For people only: nothing is recognized by its name.
    const EXTENSIONS: &'static [&'static str] = &[];
    /// Options of [`create`](Self::create) as name and one line of help. Empty for a plugin that cannot create.
    const CREATE_OPTIONS: &'static [(&'static str, &'static str)] = &[];
    /// Whether [`create`](Self::create) is implemented.
    const CAN_CREATE: bool = false;

    /// Rate how certain it is that the image has this format: [`PROBE_NO`] (0) to [`PROBE_CERTAIN`] (100).
    ///
    /// # Errors
    /// Only when reading fails. An image that is too short for a header is [`PROBE_NO`].
    fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError>;

    /// List the files that the image consists of, except the one that names it, in an order that the guest half shares: each
    /// becomes a device of its own. If the content of the image matters, the engine opens them before it asks for the facts,
    /// under the rules for names that images record. Called under the same condition as `facts`.
    ///
    /// # Errors
    /// As [`facts`](Self::facts).
    fn files(_image: &ImageReader<'_>) -> Result<Vec<ImageFile>, PluginError> {
        Ok(Vec::new())
    }

    /// Read the facts from the header. The [other files](Self::files) can be [read](ImageReader::file) only if the engine
    /// opened them; `instar info` opens the named file alone. The engine calls this only if `probe` did not return
    /// [`PROBE_NO`].
    ///
    /// # Errors
    /// [`ErrorCode::ParseFailed`] for a header that makes no sense, [`ErrorCode::UnsupportedFormat`] for one that is
    /// too new to be understood. A feature that can be *shown* but not worked with is a fact, refused by `verdict`.
    fn facts(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError>;

    /// Decide whether the image with the facts `own` may take the part `role` in an operation. `context` describes what may
    /// matter: the image that backs it, and the data that may arrive. Neither the kind of operation nor the formats of the
    /// other images may matter.
    ///
    /// For [`Role::Write`], [`Verdict::max_length`] bounds the length of the file after everything has
    /// [arrived](Context::arriving). For [`Role::Empty`] it is 0, unless the file has to grow before it can be emptied.
    fn verdict(role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict;

    /// Derive the identity that the image with the facts `own` gets when data is written into it from the layers above, the
    /// lowest of which has the facts `child`. Empty if the image keeps its identity; at most
    /// [`IDENTITY_MAX`](crate::IDENTITY_MAX) bytes.
    ///
    /// The result depends on nothing but both images, so that an operation that was interrupted between them derives the same
    /// identity again. It depends on the child's [`identity`](ImageFacts::identity), so that two copies of an image that
    /// received different children get different identities. The guest half derives the same ([`Sink::next_identity`] in the
    /// guest's SDK). `child` may have another format.
    ///
    /// None by default.
    ///
    /// [`Sink::next_identity`]: https://docs.rs/instar-guest-sdk
    fn next_identity(_own: &ImageFacts, _child: &ImageFacts) -> Vec<u8> {
        Vec::new()
    }

    /// Tell a person what the facts do not say about the image: what an operation would do to it, what keeps it from being
    /// used, what is unusual about it. At most 16 lines of at most 300 bytes, without a final stop, which the engine prints.
    /// `facts` is the result of [`facts`](Self::facts) for this image.
    ///
    /// None by default.
    ///
    /// # Errors
    /// As [`facts`](Self::facts). The engine prints the error in place of the notes and continues.
    fn notes(_image: &ImageReader<'_>, _facts: &ImageFacts) -> Result<Vec<String>, PluginError> {
        Ok(Vec::new())
    }

    /// Return the guest half.
    fn guest_module() -> GuestModule;

    /// Lay out a new, empty image.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] for an unknown option (name it, and list the known ones) or an invalid value.
    fn create(_spec: &CreateSpec) -> Result<CreatedImage, PluginError> {
        Err(PluginError::new(ErrorCode::NotImplemented, format!("the {} plugin cannot create images", Self::NAME)))
    }

    /// Compute the space of the image that [`create`](Self::create) would make for the same `spec`, whose name may be empty,
    /// once it has these persistent bitmaps as well. Creates nothing.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    fn measure(_spec: &CreateSpec, _bitmaps: &[BitmapFacts]) -> Result<Footprint, PluginError> {
        Err(PluginError::new(ErrorCode::NotImplemented, format!("the {} plugin cannot measure images", Self::NAME)))
    }
}
