//! Intents about images and disks.

use super::{Decision, refuse_if_busy};
use crate::intent::{NewDisk, NewImage, Resource};
use crate::ledger::Draft;
use crate::model::limits::{MAX_IMAGES, MAX_POOL_DISKS};
use crate::model::{
    Actor, Disk, DiskState, Image, ImageState, Operation, Subject, VmState, Work, name,
};
use crate::operation::{begin_deletion, fresh};
use crate::view::View;
use godwit_wire::devices::DiskFormat;
use godwit_wire::id::{DiskId, ImageId, OperationId, PoolId, VmId};
use godwit_wire::problem::{FieldProblem, Problem};
use godwit_wire::storage::{DiskOrigin, ImportSource, MAX_DISK, MIN_DISK};
use godwit_wire::unit::Bytes;

/// The pool that was asked for, or the only choice there is.
pub(super) fn choose_pool(view: &View, wanted: Option<PoolId>) -> Result<PoolId, FieldProblem> {
    let pools = view.pools();
    if let Some(id) = wanted {
        let able = pools
            .get(&id)
            .is_some_and(|pool| pool.able_hosts().next().is_some());
        return if able {
            Ok(id)
        } else {
            Err(FieldProblem::new(
                "pool",
                format!("no host can use the storage pool {}", view.pool_name(id)),
                "`godwit pool list` shows the pools there are and what troubles them",
            ))
        };
    }
    let able: Vec<_> = pools
        .values()
        .filter(|pool| pool.able_hosts().next().is_some())
        .collect();
    let shared: Vec<_> = able.iter().filter(|pool| pool.is_shared()).collect();
    match (able.as_slice(), shared.as_slice()) {
        ([], _) => Err(FieldProblem::new(
            "pool",
            "no host has a storage pool",
            "start a host with --storage NAME=DIRECTORY",
        )),
        ([only], _) => Ok(only.id),
        (_, [only]) => Ok(only.id),
        (several, _) => {
            let names: Vec<&str> = several.iter().map(|pool| pool.name.as_str()).collect();
            Err(FieldProblem::new(
                "pool",
                format!("there are several: {}", names.join(", ")),
                "name the one to use",
            ))
        }
    }
}

/// What follows from what was asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct DiskPlan {
    pub(super) pool: PoolId,
    pub(super) format: DiskFormat,
    pub(super) bytes: Option<Bytes>,
}

/// Checks a disk to be; field names are without the path to the disk.
pub(super) fn plan_disk(
    view: &View,
    pool: Option<PoolId>,
    bytes: Option<Bytes>,
    format: Option<DiskFormat>,
    from: &DiskOrigin,
) -> Result<DiskPlan, FieldProblem> {
    let bad =
        |field: &str, problem: String, remedy: &str| Err(FieldProblem::new(field, problem, remedy));
    if let Some(size) = bytes.filter(|size| *size < MIN_DISK || *size > MAX_DISK) {
        let problem = format!("{size} is outside {MIN_DISK} to {MAX_DISK}");
        return bad("bytes", problem, "choose a size within the limits");
    }
    let (home, least, usual) = match from {
        DiskOrigin::Blank => {
            if bytes.is_none() {
                let problem = "a blank disk needs a size".to_owned();
                return bad("bytes", problem, "give its size, or what it is made from");
            }
            (None, None, DiskFormat::Raw)
        }
        DiskOrigin::Image { image } => {
            let Some(image) = view.images.get(image) else {
                let problem = format!("there is no image {image}");
                return bad("image", problem, "`godwit image list` shows the images");
            };
            if image.state != ImageState::Ready || image.operation.is_some() {
                let problem = format!("the image {} is not ready", image.name);
                return bad("image", problem, "wait until it is, or use another");
            }
            if format == Some(DiskFormat::Raw) {
                let problem = "a thin copy of an image cannot be raw".to_owned();
                return bad("format", problem, "use qcow2, or leave it out");
            }
            let size = Some(image.virtual_bytes);
            (Some(image.pool), size, DiskFormat::Qcow2)
        }
        DiskOrigin::Disk { disk } => {
            let Some(disk) = view.disks.get(disk) else {
                let problem = format!("there is no disk {disk}");
                return bad("clone_of", problem, "`godwit disk list` shows the disks");
            };
            if disk.state != DiskState::Ready || disk.operation.is_some() {
                let problem = format!("the disk {} is busy or not ready", disk.name);
                return bad("clone_of", problem, "wait until it is ready");
            }
            if let Some(vm) = running_user(view, disk.id) {
                let problem = format!("{vm} may be writing the disk {}", disk.name);
                return bad("clone_of", problem, "stop that VM first");
            }
            (Some(disk.pool), disk.bytes, disk.format)
        }
    };
    if let (Some(least), Some(size)) = (least, bytes.filter(|size| Some(*size) < least)) {
        let problem = format!("{size} is less than the {least} of what it is made from");
        return bad("bytes", problem, "make it at least as large");
    }
    let pool = match (home, pool) {
        (Some(home), Some(pool)) if home != pool => {
            let problem = format!(
                "it is made from something in the pool {}, not in {}",
                view.pool_name(home),
                view.pool_name(pool)
            );
            return bad("pool", problem, "leave the pool out, or import it there");
        }
        (home, pool) => choose_pool(view, home.or(pool))?,
    };
    Ok(DiskPlan {
        pool,
        format: format.unwrap_or(usual),
        bytes: bytes.or(least),
    })
}

/// Name of a VM with the disk that has not been proven to be off.
fn running_user(view: &View, disk: DiskId) -> Option<String> {
    view.users_of(disk)
        .iter()
        .filter_map(|(vm, _)| view.vms.get(vm))
        .find(|vm| vm.owner.is_some() || vm.operation.is_some())
        .map(|vm| vm.name.clone())
}

/// A disk's record; nothing is checked or written.
pub(super) fn record(
    draft: &Draft<'_>,
    name: String,
    plan: DiskPlan,
    origin: DiskOrigin,
    created_with: Option<VmId>,
) -> Disk {
    Disk {
        id: DiskId::fresh(),
        name,
        pool: plan.pool,
        bytes: plan.bytes,
        format: plan.format,
        origin,
        made_for: None,
        created_with,
        state: DiskState::Creating,
        operation: None,
        created_at: draft.now(),
        changed_at: draft.now(),
    }
}

/// Holds what a new disk is made from, so that it stays as it is until the disk is there.
pub(super) fn hold_origin(
    view: &View,
    draft: &mut Draft<'_>,
    origin: &DiskOrigin,
    operation: OperationId,
) {
    match origin {
        DiskOrigin::Blank => {}
        // Written, so that it cannot be deleted at another server at the same time; it stays usable by others.
        DiskOrigin::Image { image } => {
            if let Some(image) = view.images.get(image) {
                draft.put_image(image.as_ref().clone());
            }
        }
        DiskOrigin::Disk { disk } => {
            if let Some(mut disk) = draft.disk(*disk) {
                disk.operation = Some(operation);
                draft.put_disk(disk);
            }
        }
    }
}

pub(super) fn disk_name_is_free(view: &View, name: &str) -> Result<(), Problem> {
    match view.find_disk(name) {
        None => Ok(()),
        Some(_) => Err(
            Problem::conflict("name-taken", format!("there is a disk {name} already"))
                .with_remedy("choose another name, or delete that disk first"),
        ),
    }
}

pub(super) fn room_for_disks(view: &View, more: usize) -> Result<(), Problem> {
    if view.disks.len() + more <= MAX_POOL_DISKS {
        return Ok(());
    }
    let detail = format!("a pool has at most {MAX_POOL_DISKS} disks");
    Err(Problem::conflict("pool-full", detail))
}

pub(super) fn create_disk(
    view: &View,
    draft: &mut Draft<'_>,
    new: &NewDisk,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let mut problems: Vec<FieldProblem> = name::problem("name", &new.name).into_iter().collect();
    let plan = plan_disk(view, new.pool, new.bytes, new.format, &new.from);
    let plan = match plan {
        Ok(plan) if problems.is_empty() => plan,
        Ok(_) => return Err(Problem::invalid(problems)),
        Err(problem) => {
            problems.push(problem);
            return Err(Problem::invalid(problems));
        }
    };
    disk_name_is_free(view, &new.name)?;
    room_for_disks(view, 1)?;
    let mut disk = record(draft, new.name.clone(), plan, new.from.clone(), None);
    let id = disk.id;
    let subject = Subject::disk(id, &disk.name);
    let work = Work::CreateDisk { disk: id };
    let operation = fresh(work, subject, actor, None, draft.now());
    let operation_id = operation.id;
    disk.operation = Some(operation_id);
    hold_origin(view, draft, &new.from, operation_id);
    let effect = format!(
        "the disk {} is made in {}",
        disk.name,
        view.pool_name(disk.pool)
    );
    draft.put_operation(operation);
    draft.put_disk(disk);
    Ok(Decision::new(
        Resource::Disk(id),
        Some(operation_id),
        effect,
    ))
}

fn find_disk(view: &View, id: DiskId) -> Result<Disk, Problem> {
    let disk = view
        .disks
        .get(&id)
        .ok_or_else(|| Problem::not_found("disk", id))?;
    refuse_if_busy(&disk.name, under_way(view, disk.operation))?;
    Ok(disk.as_ref().clone())
}

fn under_way(view: &View, operation: Option<OperationId>) -> Option<&Operation> {
    view.operations.get(&operation?).map(AsRef::as_ref)
}

pub(super) fn grow_disk(
    view: &View,
    draft: &mut Draft<'_>,
    id: DiskId,
    bytes: Bytes,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let mut disk = find_disk(view, id)?;
    if disk.state != DiskState::Ready {
        let detail = format!("{} is not ready", disk.name);
        return Err(Problem::conflict("not-ready", detail).with_remedy("delete it"));
    }
    let present = disk.bytes.unwrap_or(Bytes(0));
    if bytes < present || bytes > MAX_DISK {
        let problem = match bytes < present {
            true => format!("{bytes} is less than the {present} the disk has"),
            false => format!("{bytes} is more than {MAX_DISK}"),
        };
        let remedy = "a disk only grows, up to the limit";
        return Err(Problem::invalid(vec![FieldProblem::new(
            "bytes", problem, remedy,
        )]));
    }
    if bytes == present {
        let effect = format!("{} has {bytes} already", disk.name);
        return Ok(Decision::new(Resource::Disk(id), None, effect));
    }
    for (vm, _) in view.users_of(id) {
        let Some(vm) = view.vms.get(vm) else { continue };
        if vm.operation.is_some() {
            let detail = format!("{} has the disk and is busy", vm.name);
            return Err(Problem::conflict("busy", detail)
                .with_remedy("wait until its operation ends, or cancel it"));
        }
        let state = view.vm_status(vm).state;
        if vm.owner.is_some() && !matches!(state, VmState::Running | VmState::Paused) {
            let detail = format!("{} has the disk and is {state:?}", vm.name).to_lowercase();
            return Err(Problem::conflict("not-running", detail)
                .with_remedy("bring the VM back to running, or stop it"));
        }
    }
    let work = Work::GrowDisk { disk: id, bytes };
    let subject = Subject::disk(id, &disk.name);
    let operation = fresh(work, subject, actor, None, draft.now());
    let operation_id = operation.id;
    disk.operation = Some(operation_id);
    let effect = format!("{} grows from {present} to {bytes}", disk.name);
    draft.put_operation(operation);
    draft.put_disk(disk);
    Ok(Decision::new(
        Resource::Disk(id),
        Some(operation_id),
        effect,
    ))
}

pub(super) fn delete_disk(
    view: &View,
    draft: &mut Draft<'_>,
    id: DiskId,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let disk = find_disk(view, id)?;
    if let Some((vm, _)) = view.users_of(id).first() {
        let name = view.vms.get(vm).map(|vm| vm.name.clone());
        let detail = format!(
            "{} is attached to {}",
            disk.name,
            name.unwrap_or_else(|| vm.to_string())
        );
        return Err(Problem::conflict("in-use", detail)
            .with_remedy("delete the VM, or take the disk off it while it is off"));
    }
    let effect = format!("{} is deleted, with all that is on it", disk.name);
    let operation = begin_deletion(draft, disk, actor, None);
    Ok(Decision::new(Resource::Disk(id), Some(operation), effect))
}

pub(super) fn create_image(
    view: &View,
    draft: &mut Draft<'_>,
    new: &NewImage,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let mut problems: Vec<FieldProblem> = name::problem("name", &new.name).into_iter().collect();
    let mut bad = |field: &str, problem: String, remedy: &str| {
        problems.push(FieldProblem::new(field, problem, remedy));
    };
    match &new.source {
        ImportSource::Path { path } if !path.is_absolute() => bad(
            "source.path",
            format!("{} is not an absolute path", path.display()),
            "give the full path of the file on the host",
        ),
        ImportSource::Upload { bytes } if bytes.0 == 0 || *bytes > MAX_DISK => bad(
            "source.bytes",
            format!("{bytes} is outside 1 B to {MAX_DISK}"),
            "say how many bytes the file has",
        ),
        _ => {}
    }
    if let Some(digest) = &new.sha256
        && (digest.len() != 64 || !digest.bytes().all(|byte| byte.is_ascii_hexdigit()))
    {
        bad(
            "sha256",
            format!("{digest:?} is no SHA-256"),
            "give 64 hexadecimal digits, or leave it out",
        );
    }
    let mut pool = new.pool;
    if let Some(host) = new.host {
        let able = |id: PoolId| {
            let found = view.pool(id);
            found.is_some_and(|pool| pool.able_hosts().any(|able| able == host))
        };
        let theirs: Vec<PoolId> = view.pools().into_keys().filter(|id| able(*id)).collect();
        match (pool, theirs.as_slice()) {
            (None, [only]) => pool = Some(*only),
            (Some(id), _) if !able(id) => bad(
                "host",
                format!(
                    "{} cannot use the storage pool {}",
                    view.host_name(host),
                    view.pool_name(id)
                ),
                "choose a host that has the pool, or one of its own pools",
            ),
            _ => {}
        }
    }
    let chosen = choose_pool(view, pool).map_err(|problem| problems.push(problem));
    let Ok(pool) = chosen.and_then(|pool| problems.is_empty().then_some(pool).ok_or(())) else {
        return Err(Problem::invalid(problems));
    };
    if view.find_image(&new.name).is_some() {
        let detail = format!("there is an image {} already", new.name);
        return Err(Problem::conflict("name-taken", detail)
            .with_remedy("choose another name, or delete that image first"));
    }
    if view.images.len() >= MAX_IMAGES {
        let detail = format!("a pool has at most {MAX_IMAGES} images");
        return Err(Problem::conflict("pool-full", detail));
    }
    let id = ImageId::fresh();
    let work = Work::CreateImage {
        image: id,
        wanted: new.host,
    };
    let subject = Subject::image(id, &new.name);
    let operation = fresh(work, subject, actor, None, draft.now());
    let operation_id = operation.id;
    draft.put_image(Image {
        id,
        name: new.name.clone(),
        pool,
        source: new.source.clone(),
        state: ImageState::Importing,
        format: new.format,
        virtual_bytes: Bytes(0),
        file_bytes: Bytes(0),
        sha256: new.sha256.as_ref().map(|digest| digest.to_lowercase()),
        operation: Some(operation_id),
        created_at: draft.now(),
        changed_at: draft.now(),
    });
    draft.put_operation(operation);
    let effect = format!(
        "the image {} is imported into {}",
        new.name,
        view.pool_name(pool)
    );
    Ok(Decision::new(
        Resource::Image(id),
        Some(operation_id),
        effect,
    ))
}

pub(super) fn delete_image(
    view: &View,
    draft: &mut Draft<'_>,
    id: ImageId,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let image = view
        .images
        .get(&id)
        .ok_or_else(|| Problem::not_found("image", id))?;
    let mut image = image.as_ref().clone();
    refuse_if_busy(&image.name, under_way(view, image.operation))?;
    let based: Vec<&str> = view
        .disks_of(id)
        .filter(|disk| !matches!(disk.state, DiskState::Failed { .. }))
        .map(|disk| disk.name.as_str())
        .collect();
    if let Some(first) = based.first() {
        let copies = match based.len() - 1 {
            0 => "is a thin copy".to_owned(),
            1 => "and another disk are thin copies".to_owned(),
            others => format!("and {others} other disks are thin copies"),
        };
        let detail = format!("{first} {copies} of {}", image.name);
        return Err(Problem::conflict("in-use", detail).with_remedy("delete those disks first"));
    }
    if let Some(left) = view.copy_left_of(id) {
        let name = view.disks.get(&left).map(|disk| disk.name.clone());
        let detail = format!(
            "what {} has left of a thin copy of {} when it moved is not erased yet",
            name.unwrap_or_else(|| left.to_string()),
            image.name
        );
        return Err(Problem::conflict("in-use", detail)
            .with_remedy("wait until it is: its host may have to come back for that"));
    }
    let work = Work::DeleteImage { image: id };
    let subject = Subject::image(id, &image.name);
    let operation = fresh(work, subject, actor, None, draft.now());
    let operation_id = operation.id;
    image.operation = Some(operation_id);
    let effect = format!("the image {} is deleted", image.name);
    draft.put_operation(operation);
    draft.put_image(image);
    Ok(Decision::new(
        Resource::Image(id),
        Some(operation_id),
        effect,
    ))
}
