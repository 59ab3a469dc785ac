//! The public API of a crate, read from its sources: every public item by a name, with a text that changes when its
//! signature or layout does.

use quote::ToTokens;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use syn::{Attribute, Fields, ImplItem, Item, TraitItem, UseTree, Visibility};

/// A public item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Public {
    /// Its signature, without documentation and bodies.
    pub signature: String,
    /// For structs: the fields in their order.
    pub fields: Vec<String>,
    /// For items of traits: an implementation may leave it out.
    pub has_default: bool,
}

/// All public items by name: `Verdict`, `Verdict::refused`, `Source::verify`, `use Extent`.
pub type Api = BTreeMap<String, Public>;

/// The top folder of the repository.
#[must_use]
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../..")
}

/// The public API of the crate in this folder.
///
/// # Errors
/// When a file cannot be read or parsed.
pub fn api(folder: &Path) -> Result<Api, String> {
    let mut api = Api::new();
    read_folder(&folder.join("src"), &mut api)?;
    Ok(api)
}

fn read_folder(folder: &Path, api: &mut Api) -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", folder.display());
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|error| failed(&error))? {
        paths.push(entry.map_err(|error| failed(&error))?.path());
    }
    // Of two items of one name in different modules the last stays: that has to be the same one each time.
    paths.sort();
    for path in paths {
        if path.is_dir() {
            read_folder(&path, api)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("tests.rs") {
            let text = std::fs::read_to_string(&path).map_err(|error| failed(&error))?;
            let file = syn::parse_file(&text).map_err(|error| format!("{}: {error}", path.display()))?;
            file.items.into_iter().for_each(|item| add(item, api));
        }
    }
    Ok(())
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|a| a.path().is_ident("cfg") && a.to_token_stream().to_string().contains("test"))
}

/// Only what makes a layout is kept.
fn layout_only(attributes: &mut Vec<Attribute>) {
    attributes.retain(|attribute| attribute.path().is_ident("repr") || attribute.path().is_ident("sabi"));
}

fn text(tokens: &impl ToTokens) -> String {
    tokens.to_token_stream().to_string()
}

fn put(api: &mut Api, name: String, signature: String) {
    api.insert(name, Public { signature, fields: Vec::new(), has_default: false });
}

fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

fn field_texts(fields: &mut Fields) -> Vec<String> {
    let each = fields.iter_mut().map(|field| {
        layout_only(&mut field.attrs);
        text(field)
    });
    each.collect()
}

fn add(item: Item, api: &mut Api) {
    match item {
        Item::Fn(item) if is_public(&item.vis) => put(api, item.sig.ident.to_string(), text(&item.sig)),
        Item::Const(item) if is_public(&item.vis) => {
            put(api, item.ident.to_string(), format!("{} = {}", text(&item.ty), text(&item.expr)));
        }
        Item::Type(item) if is_public(&item.vis) => put(api, item.ident.to_string(), text(&item.ty)),
        Item::Struct(mut item) if is_public(&item.vis) => {
            layout_only(&mut item.attrs);
            let fields = field_texts(&mut item.fields);
            let head = item.attrs.iter().map(text).collect::<String>() + &text(&item.generics);
            api.insert(item.ident.to_string(), Public { signature: head, fields, has_default: false });
        }
        Item::Enum(mut item) if is_public(&item.vis) => {
            layout_only(&mut item.attrs);
            for variant in &mut item.variants {
                layout_only(&mut variant.attrs);
                let _ = field_texts(&mut variant.fields);
            }
            put(api, item.ident.to_string(), text(&item));
        }
        Item::Trait(item) if is_public(&item.vis) => {
            let head = format!("{} : {}", text(&item.generics), text(&item.supertraits));
            put(api, item.ident.to_string(), head);
            item.items.into_iter().for_each(|inner| add_of_trait(&item.ident.to_string(), inner, api));
        }
        Item::Impl(item) if item.trait_.is_none() && !is_test(&item.attrs) => {
            let owner = text(&item.self_ty).split([' ', '<']).next().unwrap_or_default().to_owned();
            for inner in item.items {
                match inner {
                    ImplItem::Fn(inner) if is_public(&inner.vis) => {
                        put(api, format!("{owner}::{}", inner.sig.ident), text(&inner.sig));
                    }
                    ImplItem::Const(inner) if is_public(&inner.vis) => {
                        put(api, format!("{owner}::{}", inner.ident), text(&inner.ty));
                    }
                    _ => {}
                }
            }
        }
        Item::Mod(item) if is_public(&item.vis) && !is_test(&item.attrs) => {
            item.content.into_iter().flat_map(|(_, items)| items).for_each(|inner| add(inner, api));
        }
        Item::Use(item) if is_public(&item.vis) => add_uses(&item.tree, api),
        // Items that a macro makes: its tokens stand for them.
        Item::Macro(item) => {
            let exported = item.attrs.iter().any(|attribute| attribute.path().is_ident("macro_export"));
            match &item.ident {
                Some(name) if exported => put(api, format!("{name}!"), String::new()),
                Some(_) => {}
                None => {
                    let name = text(&item.mac.path);
                    put(api, format!("{name}! {{}}"), text(&item.mac.tokens));
                }
            }
        }
        _ => {}
    }
}

fn add_of_trait(owner: &str, item: TraitItem, api: &mut Api) {
    let (name, signature, has_default) = match item {
        TraitItem::Fn(item) => (item.sig.ident.to_string(), text(&item.sig), item.default.is_some()),
        TraitItem::Const(item) => (item.ident.to_string(), text(&item.ty), item.default.is_some()),
        TraitItem::Type(item) => (item.ident.to_string(), text(&item.bounds), false),
        _ => return,
    };
    api.insert(format!("{owner}::{name}"), Public { signature, fields: Vec::new(), has_default });
}

fn add_uses(tree: &UseTree, api: &mut Api) {
    match tree {
        UseTree::Path(path) => add_uses(&path.tree, api),
        UseTree::Name(name) => put(api, format!("use {}", name.ident), String::new()),
        UseTree::Rename(name) => put(api, format!("use {}", name.rename), String::new()),
        UseTree::Glob(_) => {}
        UseTree::Group(group) => group.items.iter().for_each(|inner| add_uses(inner, api)),
    }
}
