//! Notices when a configuration file, or a file it names, is another one than before.
//!
//! By looking once a second rather than by inotify: a look follows symbolic links to their end, so it sees Kubernetes
//! swap `..data`, a renewal replace a file, or an editor rename one over it, without knowing how any of them does it;
//! and it works where inotify is silent (NFS, FUSE and 9p mounts) or runs out of watches. A look at the few files there
//! are costs some microseconds. What has changed is taken up once it is the same in two looks: nobody reads half of it.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::runtime::Runtime;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);

/// What makes a file this file and this content.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Stamp {
    /// Where the links lead.
    real: Option<PathBuf>,
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

type Look = Vec<(PathBuf, Option<Stamp>)>;

pub struct FileWatch {
    known: Look,
}

impl FileWatch {
    /// Takes what the files are now for what was read.
    pub async fn new(runtime: &Runtime, files: Vec<PathBuf>) -> Self {
        Self { known: look(runtime, files).await }
    }

    /// Answers when a file changed and has settled; the change counts as known then. Cancel-safe.
    pub async fn changed(&mut self, runtime: &Runtime) {
        let files: Vec<PathBuf> = self.known.iter().map(|(path, _)| path.clone()).collect();
        let mut before = None;
        loop {
            runtime.sleep(LOOK).await;
            let now = look(runtime, files.clone()).await;
            if now == self.known {
                before = None;
            } else if before.as_ref() == Some(&now) {
                self.known = now;
                return;
            } else {
                before = Some(now);
            }
        }
    }

    /// Watches these from now on. A file that was watched before and has changed since is still news.
    pub async fn set(&mut self, runtime: &Runtime, files: Vec<PathBuf>) {
        let mut look = look(runtime, files).await;
        for (path, stamp) in &mut look {
            if let Some((_, known)) = self.known.iter().find(|(known, _)| known == path) {
                stamp.clone_from(known);
            }
        }
        self.known = look;
    }
}

async fn look(runtime: &Runtime, files: Vec<PathBuf>) -> Look {
    runtime
        .blocking(move || {
            files
                .into_iter()
                .map(|path| {
                    let stamp = stamp(&path);
                    (path, stamp)
                })
                .collect()
        })
        .await
}

/// `None`: it is not there, or cannot be looked at.
fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = std::fs::metadata(path).ok()?;
    Some(Stamp {
        real: path.canonicalize().ok(),
        device: metadata.dev(),
        inode: metadata.ino(),
        size: metadata.size(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[tokio::test]
    async fn a_swapped_link_and_a_rewritten_file_are_seen_and_nothing_else_is() {
        let runtime = Runtime::production();
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for version in ["v1", "v2"] {
            std::fs::create_dir(at(version)).unwrap();
            std::fs::write(at(version).join("nudged.toml"), "").unwrap();
        }
        symlink("v1", at("..data")).unwrap();
        symlink("..data/nudged.toml", at("nudged.toml")).unwrap();
        let mut watch = FileWatch::new(&runtime, vec![at("nudged.toml"), at("later.pem")]).await;
        let quiet = runtime.timeout(Duration::from_millis(2_500), watch.changed(&runtime)).await;
        assert!(quiet.is_none(), "nothing changed");
        let patience = Duration::from_secs(20);
        symlink("v2", at("..data_tmp")).unwrap();
        std::fs::rename(at("..data_tmp"), at("..data")).unwrap();
        runtime.timeout(patience, watch.changed(&runtime)).await.expect("the link's end is another file");
        std::fs::write(at("later.pem"), "-----BEGIN").unwrap();
        runtime.timeout(patience, watch.changed(&runtime)).await.expect("a file that was not there");
        std::fs::write(at("v2").join("nudged.toml"), "#").unwrap();
        watch.set(&runtime, vec![at("nudged.toml")]).await;
        runtime.timeout(patience, watch.changed(&runtime)).await.expect("still news after a change of the list");
    }
}
