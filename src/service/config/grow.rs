//! What a running service would be with one thing more, or less: by the rules that hold for a configuration as a whole.

#![forbid(unsafe_code)]

use super::origin::{Item, Origin};
use super::{Config, ConfigError, Loader, flag};
use crate::engine::config::Need;
use crate::frontend::ublk::config::UblkConfig;
use crate::frontend::vhost_user::config::VhostUserConfig;
use std::path::{Path, PathBuf};

impl Config {
    /// This and a volume, as `--volume` takes it: its name. The same if it has that already.
    ///
    /// # Errors
    /// What is wrong with it, or with both together; a path where nothing may be added.
    pub fn with_volume(&self, text: &str) -> Result<(String, Config), ConfigError> {
        let origin = Origin::flag("volume", text);
        let (name, volume) = flag::volume(text).map_err(|reason| origin.error(reason))?;
        let (store, policy, topology, limits) = &volume;
        if let Some(there) = self.volumes.get(&name) {
            let (is_policy, is_topology, is_limits) =
                (self.policies[&name], self.topologies[&name], &self.limits[&name]);
            return match there == store
                && is_policy == *policy
                && is_topology == *topology
                && is_limits == limits
            {
                true => Ok((name, self.clone())),
                false => Err(origin.error(format!(
                    "volume {name} is there, and is another: {there}{is_topology}{is_policy}{is_limits}"
                ))),
            };
        }
        if let Some(Need::File { path, .. }) = store.summary().needs {
            self.is_allowed(path).map_err(|reason| origin.error(reason))?;
        }
        let mut loader = Loader::of(self);
        loader.add_volume(name.clone(), Item::new(volume, origin))?;
        Ok((name, loader.finish()?))
    }

    /// This and a disk, as `--ublk` takes it. The same if it has that already.
    ///
    /// # Errors
    /// As for [`with_volume`](Self::with_volume).
    pub fn with_ublk(&self, text: &str) -> Result<(UblkConfig, Config), ConfigError> {
        let origin = Origin::flag("ublk", text);
        let export = flag::ublk(text).map_err(|reason| origin.error(reason))?;
        if self.ublk.contains(&export) {
            return Ok((export, self.clone()));
        }
        if !self.allow_ublk && self.ublk.is_empty() {
            return Err(origin.error(
                "the service was started without allow-ublk (--allow-ublk), and has no rights to disks",
            ));
        }
        if export.workers.is_some() {
            return Err(origin.error(OWN_WORKERS));
        }
        let mut loader = Loader::of(self);
        loader.ublk.push(Item::new(export.clone(), origin));
        Ok((export, loader.finish()?))
    }

    /// This and a socket, as `--vhost-user` takes it. The same if it has that already.
    ///
    /// # Errors
    /// As for [`with_volume`](Self::with_volume).
    pub fn with_vhost_user(&self, text: &str) -> Result<(VhostUserConfig, Config), ConfigError> {
        let origin = Origin::flag("vhost-user", text);
        let export = flag::vhost_user(text).map_err(|reason| origin.error(reason))?;
        if self.vhost_user.contains(&export) {
            return Ok((export, self.clone()));
        }
        self.is_allowed(&export.socket).map_err(|reason| origin.error(reason))?;
        if export.workers.is_some() {
            return Err(origin.error(OWN_WORKERS));
        }
        let mut loader = Loader::of(self);
        loader.vhost_user.push(Item::new(export.clone(), origin));
        Ok((export, loader.finish()?))
    }

    /// This without a volume, which may not be there at all.
    ///
    /// # Errors
    /// Who needs it.
    pub fn without_volume(&self, name: &str) -> Result<Config, String> {
        if self.is_exported(name) {
            return Err(format!("volume {name} has exports: remove them first"));
        }
        let on = self.volumes.iter().find(|(_, volume)| volume.summary().base == Some(name));
        if let Some((above, _)) = on {
            return Err(format!("volume {above} stands on volume {name}: remove it first"));
        }
        let mut less = self.clone();
        less.volumes.remove(name);
        less.policies.remove(name);
        less.topologies.remove(name);
        less.limits.remove(name);
        Ok(less)
    }

    /// Whether something may come to be at this path.
    fn is_allowed(&self, path: &Path) -> Result<(), String> {
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        // The file itself may not be there, and may be a link to anywhere if it is.
        let real = absolute.canonicalize().or_else(|_| {
            let (parent, name) = (absolute.parent(), absolute.file_name());
            let parent = parent.unwrap_or(Path::new("/")).canonicalize()?;
            Ok::<PathBuf, std::io::Error>(parent.join(name.unwrap_or_default()))
        });
        let real = real.unwrap_or(absolute);
        let within = |of: &PathBuf| of.canonicalize().is_ok_and(|of| real.starts_with(of));
        if self.allow_paths.iter().any(within) {
            return Ok(());
        }
        let allowed: Vec<String> = self.allow_paths.iter().map(|path| path.display().to_string()).collect();
        let allowed = if allowed.is_empty() { "nothing".into() } else { allowed.join(", ") };
        Err(format!(
            "{} is outside of what may be added while the service runs (allow-paths has {allowed})",
            path.display()
        ))
    }
}

/// Workers are made at the start.
const OWN_WORKERS: &str =
    "workers= is for exports that are there when the service begins: one that is added shares the workers";

#[cfg(test)]
mod tests {
    use super::*;

    fn running(allow_ublk: bool) -> (tempfile::TempDir, Config) {
        let dir = tempfile::tempdir().unwrap();
        let mut loader = Loader::new();
        loader.add_allowed_path(dir.path().to_owned());
        if allow_ublk {
            loader.allow_ublk();
        }
        loader.add_volume_flag("a=memory:1M").unwrap();
        (dir, loader.finish().unwrap())
    }

    #[test]
    fn the_same_again_changes_nothing_and_another_is_refused() {
        let (dir, config) = running(true);
        let socket = dir.path().join("s").display().to_string();
        let (name, config) = config.with_volume("b=memory:2M,iops-total=7").unwrap();
        assert_eq!((&*name, config.volumes.len()), ("b", 2));
        assert_eq!(config.with_volume("b=memory:2M,iops-total=7").unwrap().1, config);
        let error = config.with_volume("b=memory:3M").unwrap_err().to_string();
        assert!(error.contains("is another: memory") && error.contains('7'), "{error}");
        let (_, config) = config.with_vhost_user(&format!("b={socket}")).unwrap();
        assert_eq!(config.with_vhost_user(&format!("b={socket}")).unwrap().1, config);
        let error = config.with_vhost_user(&format!("a={socket}")).unwrap_err().to_string();
        assert!(error.contains("already taken (the running service)"), "{error}");
        let (_, config) = config.with_ublk("a").unwrap();
        assert_eq!(config.with_ublk("a").unwrap().1, config);
        assert!(config.with_ublk("a,queues=2").is_err());
        assert!(config.without_volume("b").unwrap_err().contains("has exports"));
        assert_eq!(config.without_volume("c").unwrap(), config);
    }

    #[test]
    fn nothing_comes_from_where_it_may_not() {
        let (dir, config) = running(false);
        let inside = dir.path().join("link");
        std::os::unix::fs::symlink("/etc/passwd", &inside).unwrap();
        for path in
            ["/etc/passwd".to_owned(), format!("{}/../x", dir.path().display()), inside.display().to_string()]
        {
            let error = config.with_volume(&format!("x=file:{path},format=raw")).unwrap_err().to_string();
            assert!(error.contains("allow-paths has /"), "{error}");
        }
        assert!(config.with_vhost_user("a=/run/x.sock").unwrap_err().to_string().contains("outside"));
        assert!(config.with_ublk("a").unwrap_err().to_string().contains("allow-ublk"));
        let own = format!("a={}/s,workers=1", dir.path().display());
        assert!(config.with_vhost_user(&own).unwrap_err().to_string().contains("when the service begins"));
        let there = format!("x=file:{}/new,format=raw", dir.path().display());
        let (_, config) = config.with_volume(&there).unwrap();
        let (_, config) = config.with_volume("y=fault:x").unwrap();
        assert!(config.without_volume("x").unwrap_err().contains("volume y stands on"));
        assert!(config.with_volume("z=fault:none").is_err());
    }
}
