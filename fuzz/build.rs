//! The plugins are linked as libraries here, all into one program, and each exports the header by which the loader finds it.
//! Nobody looks at that header in this program: which of them is there does not matter.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg=-Wl,--allow-multiple-definition");
}
