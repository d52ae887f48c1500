//! Thin clients for a person at a terminal, and for scripts: each command is one
//! call, printed as a table or, with `--json`, as canonical proto JSON.

pub mod args;
mod call;
mod connect;
mod dead_letters;
mod dial;
mod erase;
mod failure;
mod input;
pub mod json;
mod pause;
mod place;
pub mod render;
mod seen;
mod timestamp;

pub use args::ClientCommand;
pub use call::run;
pub use failure::{ClientError, status_text};
