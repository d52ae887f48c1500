//! Compiles `proto/` into Rust without a system protoc.

use std::{env, error::Error, fs, path::PathBuf};

/// The requests whose captures the server takes apart itself: see src/proto/raw.rs.
const RAW: [&str; 3] = [
    "CaptureBatchRequest",
    "CaptureRequest",
    "CaptureStreamRequest",
];

const PACKAGE: &str = ".jebbit.segmentrelay.v1";
const REDACTED: [&str; 8] = [
    "AttributeValue",
    "AttributeValue.kind",
    "Capture",
    "Credential",
    "EraseSubjectRequest",
    "EraseSubjectRequest.subject",
    "PreviewedEvent",
    "StringList",
];

fn main() -> Result<(), Box<dyn Error>> {
    const PACKAGE_DIR: &str = "proto/jebbit/segmentrelay/v1";
    println!("cargo:rerun-if-changed=proto");

    let mut files = Vec::new();
    for entry in fs::read_dir(PACKAGE_DIR)? {
        let path = entry?.path();
        if path.extension().is_some_and(|ext| ext == "proto") {
            files.push(path);
        }
    }
    files.sort();

    // One descriptor set serves three readers: the code generator below, server
    // reflection, which shows the comments too, and the JSON forms of the command.
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(&files)?;
    let described = compiler.file_descriptor_set();

    let out_dir = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    fs::write(
        out_dir.join("descriptors.bin"),
        compiler.encode_file_descriptor_set(),
    )?;

    let server_dir = out_dir.join("server");
    fs::create_dir_all(&server_dir)?;
    let mut server = tonic_prost_build::configure()
        .build_client(false)
        .codec_path("crate::proto::codec::LeanCodec")
        .out_dir(server_dir)
        .extern_path(PACKAGE, "crate::proto");
    for name in RAW {
        server = server.extern_path(
            format!("{PACKAGE}.{name}"),
            format!("crate::proto::raw::{name}"),
        );
    }
    server.compile_fds(described.clone())?;

    tonic_prost_build::configure()
        .build_server(false)
        // Sorted maps: attributes get a stable order, and a capture one encoding.
        .btree_map(".")
        // These hold secrets or what people said: src/proto/redacted.rs prints them.
        .skip_debug(REDACTED.map(|name| format!("{PACKAGE}.{name}")))
        .compile_fds(described)?;
    Ok(())
}
