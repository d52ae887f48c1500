//! Files and directories with secrets that others may read or write. Only a warning: a mounted
//! volume may have rights that its owner cannot change.

use std::path::{Path, PathBuf};

use super::{Config, OutboxKind};

/// Files of write keys that are named in a warning, at the most.
pub(super) const MAX_WRITE_KEY_FILES: usize = 100;

impl Config {
    /// One warning for each directory or file of secrets that users other than the relay's may
    /// read or write, with its setting and the remedy. `file` is that of the configuration.
    /// What does not exist yet is made for the relay's user alone.
    #[must_use]
    pub fn exposed_files(&self, file: Option<&Path>) -> Vec<String> {
        let mut secrets: Vec<(&str, &Path)> = Vec::new();
        if self.outbox.kind == OutboxKind::Embedded {
            secrets.push(("[outbox] path", &self.outbox.path));
        }
        if self.secrets.keys.is_none() {
            secrets.push(("[secrets] key_file", &self.secrets.key_file));
        }
        if let Some(tls) = &self.tls {
            secrets.push(("[server.tls] key_file", &tls.key_file));
        }
        if let Some((_, key)) = &self.postgres.identity {
            secrets.push(("[postgres] key_file", key));
        }
        let write_keys = self.write_key_files.iter();
        secrets.extend(write_keys.map(|path| ("write_key_file", PathBuf::as_path(path))));
        let mut warnings: Vec<String> = secrets
            .iter()
            .filter_map(|(setting, path)| warning(setting, path, OTHERS_READ | OTHERS_WRITE))
            .collect();
        // It may hold no secret, but it says where events go.
        let file = file.and_then(|path| warning("configuration", path, OTHERS_WRITE));
        warnings.extend(file);
        warnings
    }
}

/// Any right of users who are neither the owner nor in its group.
const OTHERS_READ: u32 = 0o005;
/// The group's or others' right to write.
const OTHERS_WRITE: u32 = 0o022;

#[cfg(unix)]
fn warning(setting: &str, path: &Path, rights: u32) -> Option<String> {
    use std::os::unix::fs::MetadataExt;

    let found = std::fs::metadata(path).ok()?;
    let (mode, owner) = (found.mode(), found.uid());
    let shown = path.display();
    let own = if found.is_dir() { "700" } else { "600" };
    let own_user = rustix::process::geteuid().as_raw();
    if owner != own_user && owner != 0 {
        return Some(format!(
            "{setting} {shown} belongs to another user ({owner}), who may read and change it: \
             chown it to the relay's user ({own_user})"
        ));
    }
    let open = match (mode & rights & OTHERS_READ, mode & rights & OTHERS_WRITE) {
        (0, 0) => None,
        (_, 0) => Some("read"),
        (0, _) => Some("write"),
        _ => Some("read and write"),
    };
    if let Some(may) = open {
        return Some(format!(
            "{setting} {shown}: other users may {may} it (mode {:o}): chmod {own} it",
            mode & 0o777
        ));
    }
    let folder = replaceable_in(path)?;
    Some(format!(
        "{setting} {shown}: other users may put another one in its place, since they may write \
         to {}: chmod o-w,g-w it, or set its sticky bit",
        folder.display()
    ))
}

/// The directory above a path in which other users may rename what is not their own.
#[cfg(unix)]
fn replaceable_in(path: &Path) -> Option<PathBuf> {
    use std::os::unix::fs::MetadataExt;

    const STICKY: u32 = 0o1000;
    let path = std::fs::canonicalize(path).ok()?;
    let above = path.ancestors().skip(1).find(|folder| {
        std::fs::metadata(folder)
            .is_ok_and(|found| found.mode() & OTHERS_WRITE != 0 && found.mode() & STICKY == 0)
    });
    above.map(Path::to_owned)
}

#[cfg(not(unix))]
fn warning(_: &str, _: &Path, _: u32) -> Option<String> {
    None
}

#[cfg(all(test, unix))]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn each_right_of_others_is_told_and_those_of_the_owner_are_not() {
        let top = tempfile::tempdir().expect("a directory");
        let (folder, file) = (top.path().join("store"), top.path().join("key"));
        fs::create_dir(&folder).expect("made");
        fs::write(&file, "x").expect("written");
        let set = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("set");
        };
        let told = |path: &Path| warning("[x] y", path, OTHERS_READ | OTHERS_WRITE);
        for (mode, words) in [
            (0o700, ""),
            (0o750, ""),
            (0o600, ""),
            (0o640, ""),
            (0o701, "may read it"),
            (0o604, "may read it"),
            (0o620, "may write it"),
            (0o602, "may write it"),
            (0o777, "may read and write it"),
            (0o666, "may read and write it"),
        ] {
            for (path, chmod) in [(&folder, "chmod 700"), (&file, "chmod 600")] {
                set(path, mode);
                let text = told(path);
                assert_eq!(text.is_some(), !words.is_empty(), "{mode:o}: {text:?}");
                let text = text.unwrap_or_default();
                assert!(text.contains(words), "{mode:o}: {text}");
                assert!(words.is_empty() || text.contains(chmod), "{text}");
                assert_eq!(
                    warning("[x] y", path, OTHERS_WRITE).is_some(),
                    words.contains("write"),
                    "{mode:o}"
                );
                set(path, 0o700);
            }
        }
        assert_eq!(told(&top.path().join("missing")), None);
        // A directory that others may write to, without and with the sticky bit.
        set(&folder, 0o700);
        let inner = folder.join("key");
        fs::write(&inner, "x").expect("written");
        set(&inner, 0o600);
        for (mode, open) in [(0o777, true), (0o1777, false), (0o755, false)] {
            set(&folder, mode);
            let text = told(&inner);
            assert_eq!(text.is_some(), open, "{mode:o}: {text:?}");
        }
    }
}
