//! What a process did to the files of one directory, as strace saw it.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

/// The system calls that are traced: all that change a file, or where it is written.
pub(super) const CALLS: &str = "openat,creat,lseek,write,writev,pwrite64,pwritev,pwritev2,ftruncate,\
    truncate,fallocate,fsync,fdatasync,sync_file_range,copy_file_range,sendfile,unlink,unlinkat,\
    rename,renameat,renameat2,mkdir,mkdirat,rmdir,dup,dup2,dup3,fcntl";

/// A change of the directory, by the names of its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Create(String),
    Write {
        file: String,
        at: u64,
        bytes: Vec<u8>,
    },
    Truncate {
        file: String,
        length: u64,
    },
    /// All writes up to the change of this number are on the disk.
    Sync {
        file: String,
        before: usize,
    },
    /// So are the names of the directory.
    SyncNames {
        before: usize,
    },
    Remove(String),
    /// A line of the file of markers.
    Mark(String),
}

/// Reads a trace of `directory`; writes to `markers` in it become marks.
pub(super) fn changes(trace: &str, directory: &Path, markers: &str) -> Vec<Change> {
    let mut reader = Reader {
        directory: directory.to_owned(),
        markers: markers.to_owned(),
        positions: HashMap::new(),
        changes: Vec::new(),
    };
    // Calls that have begun, by thread, with the changes at their beginning.
    let mut begun: HashMap<&str, (String, usize)> = HashMap::new();
    for line in trace.lines() {
        let Some((thread, call)) = line.split_once(' ') else {
            continue;
        };
        let call = call.trim_start();
        if let Some(start) = call.strip_suffix(" <unfinished ...>") {
            let at = reader.changes.len();
            begun.insert(thread, (start.to_owned(), at));
            continue;
        }
        let before = reader.changes.len();
        match call.strip_prefix("<... ") {
            Some(rest) => {
                let Some((start, at)) = begun.remove(thread) else {
                    continue;
                };
                let rest = rest.split_once(" resumed>").map_or("", |(_, rest)| rest);
                reader.call(&format!("{start}{rest}"), at);
            }
            None => reader.call(call, before),
        }
    }
    reader.changes
}

struct Reader {
    directory: PathBuf,
    markers: String,
    /// Where descriptors stand, by their numbers.
    positions: HashMap<i64, u64>,
    changes: Vec<Change>,
}

impl Reader {
    fn call(&mut self, call: &str, before: usize) {
        let Some((name, rest)) = call.split_once('(') else {
            return;
        };
        let Some((arguments, result)) = rest.rsplit_once(" = ") else {
            return;
        };
        let Some(result) = result
            .split(['<', ' '])
            .next()
            .and_then(|it| it.parse::<i64>().ok())
        else {
            return;
        };
        if result < 0 {
            return;
        }
        let arguments = arguments.trim_end().trim_end_matches(')');
        if matches!(name, "openat" | "unlink" | "unlinkat") {
            return self.named(name, arguments, result);
        }
        let Some((number, path)) = descriptor(arguments) else {
            return;
        };
        let Some(file) = self.file(&path) else {
            if path == self.directory && matches!(name, "fsync" | "fdatasync") {
                self.changes.push(Change::SyncNames { before });
            }
            return;
        };
        let parts: Vec<&str> = arguments.split(", ").collect();
        let last = || parts.last().and_then(|it| it.parse::<u64>().ok());
        let length = u64::try_from(result).expect("not negative");
        match name {
            "write" => {
                let at = self.positions.entry(number).or_default();
                let start = *at;
                *at += length;
                self.write(file, start, quoted(arguments), length);
            }
            "pwrite64" => self.write(file, last().expect("an offset"), quoted(arguments), length),
            "lseek" => {
                self.positions.insert(number, length);
            }
            "ftruncate" => {
                let length = last().expect("a length");
                self.changes.push(Change::Truncate { file, length });
            }
            "fsync" | "fdatasync" => self.changes.push(Change::Sync { file, before }),
            "fcntl" => {}
            other => panic!("a call that is not understood: {other}({arguments})"),
        }
    }

    /// Calls that name a file by its path.
    fn named(&mut self, name: &str, arguments: &str, result: i64) {
        let path = PathBuf::from(text(&quoted(arguments)));
        let Some(file) = self.file(&path) else { return };
        if name != "openat" {
            self.changes.push(Change::Remove(file));
            return;
        }
        self.positions.insert(result, 0);
        assert!(!arguments.contains("O_APPEND") || file == self.markers);
        if arguments.contains("O_CREAT") && file != self.markers {
            self.changes.push(Change::Create(file.clone()));
        }
        if arguments.contains("O_TRUNC") {
            self.changes.push(Change::Truncate { file, length: 0 });
        }
    }

    /// A file of the directory whose content counts: the index of SQLite's log is made anew.
    fn file(&self, path: &Path) -> Option<String> {
        let name = path.strip_prefix(&self.directory).ok()?.to_str()?;
        (!name.is_empty() && !name.ends_with("-shm")).then(|| name.to_owned())
    }

    fn write(&mut self, file: String, at: u64, mut bytes: Vec<u8>, length: u64) {
        bytes.truncate(usize::try_from(length).expect("small"));
        assert_eq!(bytes.len() as u64, length, "strace cut a write off");
        self.changes.push(match file == self.markers {
            true => Change::Mark(text(&bytes).trim_end().to_owned()),
            false => Change::Write { file, at, bytes },
        });
    }
}

/// The first argument: `3</path>`.
fn descriptor(arguments: &str) -> Option<(i64, PathBuf)> {
    let (number, rest) = arguments.split_once('<')?;
    let (path, _) = rest.split_once('>')?;
    Some((number.parse().ok()?, text(&unescaped(path)).into()))
}

/// The bytes of the first text in quotes, which strace writes as `\x..`.
fn quoted(arguments: &str) -> Vec<u8> {
    let inner = arguments.split('"').nth(1).unwrap_or_default();
    unescaped(inner)
}

fn unescaped(text: &str) -> Vec<u8> {
    if !text.starts_with("\\x") {
        return text.as_bytes().to_vec();
    }
    let digits: String = text.split("\\x").collect();
    hex::decode(digits).expect("hexadecimal digits")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
