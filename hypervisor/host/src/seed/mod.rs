//! The cloud-init seed disk (data source NoCloud): a small FAT volume labelled `CIDATA`.
//!
//! FAT rather than ISO 9660, which NoCloud takes as well: there is a kept crate that writes it, and every guest that
//! can boot through UEFI has the driver.
//!
//! The same spec gives the same bytes on every host: a machine that moves finds the disk it has always had. So the
//! volume's id comes from the content, and every time in it is the same.

use fatfs::{Date, DateTime, FatType, FileSystem, FormatVolumeOptions, FsOptions, TimeProvider};
use godwit_wire::devices::CloudInit;
use godwit_wire::id::VmId;
use ring::digest;
use std::io::{self, Cursor, Write};

/// Size of the seed disk.
const SEED_BYTES: usize = 1 << 20;
/// The label NoCloud looks for, padded as FAT stores it.
const LABEL: [u8; 11] = *b"CIDATA     ";

/// The seed disk of a machine.
///
/// # Errors
/// Documents that do not fit.
pub(crate) fn seed(vm: VmId, spec: &CloudInit) -> io::Result<Vec<u8>> {
    let files = documents(vm, spec);
    let mut content = digest::Context::new(&digest::SHA256);
    for (name, text) in &files {
        content.update(name.as_bytes());
        content.update(&(text.len() as u64).to_be_bytes());
        content.update(text.as_bytes());
    }
    let content = content.finish();
    let volume_id = content
        .as_ref()
        .first_chunk::<4>()
        .map_or(0, |bytes| u32::from_be_bytes(*bytes));
    let mut disk = Cursor::new(vec![0; SEED_BYTES]);
    let format = FormatVolumeOptions::new()
        .fat_type(FatType::Fat12)
        .volume_id(volume_id)
        .volume_label(LABEL);
    fatfs::format_volume(&mut disk, format)?;
    disk.set_position(0);
    {
        let options = FsOptions::new().time_provider(&FIXED_TIME);
        let volume = FileSystem::new(&mut disk, options)?;
        for (name, text) in &files {
            let mut file = volume.root_dir().create_file(name)?;
            file.write_all(text.as_bytes())?;
            file.flush()?;
        }
        volume.unmount()?;
    }
    Ok(disk.into_inner())
}

/// Names and texts of the files, in the order they are written.
fn documents(vm: VmId, spec: &CloudInit) -> Vec<(&'static str, String)> {
    let mut files = vec![
        ("meta-data", meta_data(vm, spec)),
        ("user-data", user_data(spec)),
    ];
    if !spec.network_config.is_empty() {
        files.push(("network-config", spec.network_config.clone()));
    }
    files
}

fn meta_data(vm: VmId, spec: &CloudInit) -> String {
    let instance = if spec.instance_id.is_empty() {
        vm.to_string()
    } else {
        spec.instance_id.clone()
    };
    let mut text = format!("instance-id: {}\n", quoted(&instance));
    if !spec.hostname.is_empty() {
        text += &format!("local-hostname: {}\n", quoted(&spec.hostname));
    }
    // The operator's own user-data is not touched; keys reach the default user by this way too.
    if !spec.user_data.is_empty() && !spec.ssh_keys.is_empty() {
        text += &list("public-keys", &spec.ssh_keys);
    }
    text
}

fn user_data(spec: &CloudInit) -> String {
    if !spec.user_data.is_empty() {
        return spec.user_data.clone();
    }
    let mut text = "#cloud-config\n".to_owned();
    if !spec.hostname.is_empty() {
        text += &format!("hostname: {}\n", quoted(&spec.hostname));
    }
    if !spec.ssh_keys.is_empty() {
        text += &list("ssh_authorized_keys", &spec.ssh_keys);
    }
    text
}

fn list(name: &str, items: &[String]) -> String {
    let lines = items.iter().map(|item| format!("  - {}\n", quoted(item)));
    format!("{name}:\n{}", lines.collect::<String>())
}

/// A YAML string: every JSON string is one.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The time of every file in every seed.
#[derive(Debug)]
struct FixedTime;

static FIXED_TIME: FixedTime = FixedTime;

impl TimeProvider for FixedTime {
    fn get_current_date(&self) -> Date {
        Date {
            year: 2000,
            month: 1,
            day: 1,
        }
    }

    fn get_current_date_time(&self) -> DateTime {
        DateTime {
            date: self.get_current_date(),
            time: fatfs::Time {
                hour: 0,
                min: 0,
                sec: 0,
                millis: 0,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use uuid::Uuid;

    const VM: VmId = VmId(Uuid::nil());

    fn read(disk: &[u8], name: &str) -> Option<String> {
        let volume = FileSystem::new(Cursor::new(disk.to_vec()), FsOptions::new()).unwrap();
        let mut text = String::new();
        volume
            .root_dir()
            .open_file(name)
            .ok()?
            .read_to_string(&mut text)
            .unwrap();
        Some(text)
    }

    fn spec() -> CloudInit {
        CloudInit {
            instance_id: "i-1".into(),
            hostname: "web".into(),
            ssh_keys: vec!["ssh-ed25519 AAAA \"a\": b".into()],
            ..CloudInit::default()
        }
    }

    #[test]
    fn keys_and_host_name_reach_the_guest_without_user_data() {
        let disk = seed(VM, &spec()).unwrap();
        assert_eq!(
            read(&disk, "meta-data").unwrap(),
            "instance-id: \"i-1\"\nlocal-hostname: \"web\"\n"
        );
        assert_eq!(
            read(&disk, "user-data").unwrap(),
            "#cloud-config\nhostname: \"web\"\nssh_authorized_keys:\n  - \"ssh-ed25519 AAAA \\\"a\\\": b\"\n"
        );
        assert_eq!(read(&disk, "network-config"), None);
        let volume = FileSystem::new(Cursor::new(disk), FsOptions::new()).unwrap();
        let label = volume.read_volume_label_from_root_dir().unwrap();
        assert_eq!(label.as_deref(), Some("CIDATA"));
        assert_eq!(volume.volume_label(), "CIDATA");
    }

    #[test]
    fn the_operators_own_user_data_stays_as_it_is_and_keys_go_beside_it() {
        let spec = CloudInit {
            user_data: "#!/bin/sh\necho hello\n".into(),
            network_config: "version: 2\n".into(),
            ..spec()
        };
        let disk = seed(VM, &spec).unwrap();
        assert_eq!(read(&disk, "user-data").unwrap(), spec.user_data);
        assert_eq!(read(&disk, "network-config").unwrap(), "version: 2\n");
        let meta = read(&disk, "meta-data").unwrap();
        assert!(
            meta.ends_with("public-keys:\n  - \"ssh-ed25519 AAAA \\\"a\\\": b\"\n"),
            "{meta}"
        );
    }

    #[test]
    fn the_same_spec_gives_the_same_disk_and_another_one_another_volume() {
        let disk = seed(VM, &spec()).unwrap();
        assert_eq!(seed(VM, &spec()).unwrap(), disk);
        let volume = FileSystem::new(Cursor::new(disk.clone()), FsOptions::new()).unwrap();
        for entry in volume.root_dir().iter() {
            let entry = entry.unwrap();
            let years = [entry.created().date.year, entry.modified().date.year];
            assert_eq!((years, entry.accessed().year), ([2000; 2], 2000));
        }
        let other = CloudInit {
            instance_id: "i-2".into(),
            ..spec()
        };
        let id = |disk: &[u8]| {
            FileSystem::new(Cursor::new(disk.to_vec()), FsOptions::new())
                .unwrap()
                .volume_id()
        };
        assert_ne!(id(&disk), id(&seed(VM, &other).unwrap()));
    }

    #[test]
    fn documents_that_do_not_fit_are_an_error() {
        let spec = CloudInit {
            user_data: "x".repeat(2 * SEED_BYTES),
            ..spec()
        };
        assert!(seed(VM, &spec).is_err());
    }
}
