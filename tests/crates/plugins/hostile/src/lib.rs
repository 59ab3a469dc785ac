//! A plugin for the format `hostile` whose images give orders: `HOSTILE WHEN DEED PATH`. It stands for a plugin that an
//! image has taken over.

use instar_plugin_api::{
    export_plugin, BackingPointer, Context, ErrorCode, Feature, FormatPlugin, GuestModule, ImageFacts, ImageReader,
    PluginError, Role, Verdict, PROBE_CERTAIN, PROBE_NO,
};
use std::fs;
use std::io;
use std::mem::ManuallyDrop;
use std::net::{TcpStream, UdpSocket};
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

struct Hostile;

/// The text of an image, if it is one.
fn text(image: &ImageReader<'_>) -> Result<Option<String>, PluginError> {
    if image.length() < 8 || image.read_vec(0, 8)? != b"HOSTILE " {
        return Ok(None);
    }
    let length = usize::try_from(image.length()).unwrap_or(0).min(4096);
    Ok(Some(String::from_utf8_lossy(&image.read_vec(0, length)?).into_owned()))
}

/// Obey, if this is the time; what came of it.
fn obey(text: &str, now: &str) -> Option<String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let &[_, when, deed, path] = words.as_slice() else { return None };
    (when == now).then(|| match attempt(deed, path) {
        Ok(()) => format!("{deed} succeeded"),
        Err(error) => format!("{deed} failed: {error}"),
    })
}

fn attempt(deed: &str, path: &str) -> io::Result<()> {
    match deed {
        "read" => fs::read(path).map(drop),
        "write" => fs::write(path, "hostile"),
        "append" => fs::OpenOptions::new().append(true).open(path).map(drop),
        "list" => fs::read_dir(path).map(drop),
        "remove" => fs::remove_file(path),
        "rename" => fs::rename(path, format!("{path}.renamed")),
        "exec" => Err(Command::new("/usr/bin/touch").arg(path).exec()),
        "thread" => std::thread::Builder::new().spawn(|| ()).map(|thread| drop(thread.join())),
        // The path is the number of a descriptor.
        "descriptor" => {
            let number = path.parse().map_err(io::Error::other)?;
            // SAFETY: whether it is open is what is asked; it is not closed at the end.
            let file = ManuallyDrop::new(unsafe { fs::File::from_raw_fd(number) });
            file.read_at(&mut [0], 0).map(drop)
        }
        "spawn" => Command::new("/usr/bin/touch").arg(path).status().map(drop),
        "tcp" => TcpStream::connect("127.0.0.1:9").map(drop),
        "udp" => UdpSocket::bind("127.0.0.1:0").map(drop),
        _ => Err(io::Error::other("an unknown order")),
    }
}

fn outcome(text: &str, now: &str) -> Result<(), PluginError> {
    match obey(text, now) {
        Some(message) => Err(PluginError::new(ErrorCode::ParseFailed, message)),
        None => Ok(()),
    }
}

impl FormatPlugin for Hostile {
    const NAME: &'static str = "hostile";
    const DESCRIPTION: &'static str = "does what images tell it to";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");

    fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
        let Some(text) = text(image)? else { return Ok(PROBE_NO) };
        outcome(&text, "probe")?;
        Ok(PROBE_CERTAIN)
    }

    fn facts(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
        let text = text(image)?.unwrap_or_default();
        outcome(&text, "facts")?;
        let mut facts = ImageFacts::new(Self::NAME, 512, 0, image.length());
        let name = b"base".to_vec().into();
        let format = Some(b"qcow2".to_vec().into()).into();
        facts.backing = Some(BackingPointer { name, other_names: Default::default(), format }).into();
        // The verdict gets no reader.
        facts.features.push(Feature::text("orders", text.trim_end(), false));
        Ok(facts)
    }

    fn verdict(_: Role, own: &ImageFacts, _: &Context<'_>) -> Verdict {
        let orders = own.text("orders").unwrap_or_default();
        let outcome = obey(orders, "verdict").unwrap_or_else(|| "nothing was tried".to_owned());
        Verdict::refused(ErrorCode::PluginRefused, outcome)
    }

    fn guest_module() -> GuestModule {
        GuestModule::source_and_sink(b"\x7fELF")
    }
}

export_plugin!(Hostile);
