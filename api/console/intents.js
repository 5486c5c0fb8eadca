// What an operator can ask of VMs, hosts and operations, and when it makes sense.

import { openDialog, confirm } from './parts/dialog.js';
import { perform } from './parts/notices.js';
import { patch, post, remove } from './lib/api.js';
import { go } from './lib/router.js';
import { CreateVmDialog } from './dialogs/create-vm.js';
import { EvacuateDialog } from './dialogs/evacuate.js';
import { MaintenanceDialog } from './dialogs/maintenance.js';
import { MigrateDialog } from './dialogs/migrate.js';
import { UpgradeDialog } from './dialogs/upgrade.js';
import { AddHostDialog } from './dialogs/add-host.js';
import { CreateDiskDialog, CreateImageDialog, GrowDiskDialog } from './dialogs/storage.js';
import { CreateNetworkDialog } from './dialogs/create-network.js';

const GRACE_MS = 30_000;

const send = (vm, verb, what, body) => perform(`${what} ${vm.name}`, () => post(`/v1/vms/${vm.id}/${verb}`, body));

async function afterConfirm(question, act) {
  if (await confirm(question)) await act();
}

/** Everything that can be asked of `vm` now: `{id, label, run, danger, main}`; `main` ones come first as buttons. */
export function vmIntents(vm) {
  const is = (...states) => states.includes(vm.state);
  const up = is('running', 'paused', 'migrating', 'starting');
  const all = [
    is('stopped', 'failed', 'pending') && { id: 'start', label: 'Start', main: true, run: () => send(vm, 'start', 'Start') },
    is('running', 'paused') && { id: 'migrate', label: 'Migrate…', main: true, run: () => openDialog(MigrateDialog, { vm }) },
    is('paused') && { id: 'resume', label: 'Resume', main: true, run: () => send(vm, 'resume', 'Resume') },
    postCopyIntent(vm),
    is('running') && { id: 'pause', label: 'Pause', run: () => send(vm, 'pause', 'Pause') },
    is('running') && {
      id: 'reboot', label: 'Reboot…',
      run: () => afterConfirm({ title: `Reboot ${vm.name}?`, text: 'The guest starts afresh; what it holds only in memory is lost.',
        verb: 'Reboot', danger: true }, () => send(vm, 'reboot', 'Reboot')),
    },
    up && {
      id: 'stop', label: 'Stop…', main: is('running'),
      run: () => afterConfirm({ title: `Stop ${vm.name}?`,
        text: `The guest is asked to shut down and stopped after ${GRACE_MS / 1000} seconds if it has not.`, verb: 'Stop', danger: true },
        () => send(vm, 'stop', 'Stop', { mode: 'graceful', timeout_ms: GRACE_MS })),
    },
    (up || is('stopping')) && {
      id: 'kill', label: 'Stop at once…', danger: true,
      run: () => afterConfirm({ title: `Stop ${vm.name} at once?`, text: 'The guest is not asked. It is as if the power had failed.',
        verb: 'Stop at once', danger: true },
        () => send(vm, 'stop', 'Stop', { mode: 'kill' })),
    },
    is('stopped', 'failed', 'pending') && {
      id: 'delete', label: 'Delete…', danger: true,
      run: () => afterConfirm({ title: `Delete ${vm.name}?`,
        text: 'The VM and the disks that were created with it are removed from the pool. This cannot be taken back.', verb: 'Delete', danger: true },
        () => perform(`Delete ${vm.name}`, () => remove(`/v1/vms/${vm.id}`))),
    },
  ];
  return all.filter(Boolean);
}

/** Whether its moves may let the guest go ahead of its memory. */
function postCopyIntent(vm) {
  const allowed = vm.post_copy !== 'forbidden';
  const set = (to, what) => perform(`${what} ${vm.name}`, () => patch(`/v1/vms/${vm.id}`, { post_copy: to }));
  return allowed
    ? { id: 'forbid-post-copy', label: 'Forbid post-copy', run: () => set('forbidden', 'Forbid post-copy for') }
    : { id: 'allow-post-copy', label: 'Allow post-copy', run: () => set('allowed', 'Allow post-copy for') };
}

/** Everything that can be asked of `host` now, except its maintenance and its upgrade. */
export function hostIntents(host) {
  const ask = (verb, what) => perform(`${what} ${host.name}`, () => post(`/v1/hosts/${host.id}/${verb}`));
  const guests = host.committed.vms;
  const all = [
    host.state === 'up' && { id: 'cordon', label: 'Cordon', main: true, run: () => ask('cordon', 'Cordon') },
    host.state === 'cordoned' && { id: 'uncordon', label: 'Uncordon', main: true, run: () => ask('uncordon', 'Uncordon') },
    ['up', 'cordoned'].includes(host.state) && guests > 0 && {
      id: 'evacuate', label: 'Evacuate…',
      run: async () => {
        if (await openDialog(EvacuateDialog, { host })) await ask('evacuate', 'Evacuate');
      },
    },
    guests === 0 && host.state !== 'joining' && {
      id: 'remove', label: 'Remove from pool…', danger: true,
      run: () => afterConfirm({ title: `Remove ${host.name} from the pool?`,
        text: 'Its certificate is no longer accepted; to come back it needs a new join token.', verb: 'Remove', danger: true },
        () => perform(`Remove ${host.name}`, () => remove(`/v1/hosts/${host.id}`))),
    },
  ];
  return all.filter(Boolean);
}

const deletion = (kind, thing, text) => ({
  id: 'delete', label: 'Delete…', danger: true,
  run: () => afterConfirm({ title: `Delete ${thing.name}?`, text, verb: 'Delete', danger: true },
    () => perform(`Delete ${thing.name}`, () => remove(`/v1/${kind}/${thing.id}`))),
});

export const imageIntents = (image) => (image.operation ? [] : [deletion('images', image, 'Disks can no longer be made from it.')]);
export const networkIntents = (network) => [deletion('networks', network, 'It must have no VMs.')];

export function diskIntents(disk) {
  if (disk.operation || disk.state !== 'ready') return [];
  return [
    { id: 'grow', label: 'Grow…', main: true, run: () => openDialog(GrowDiskDialog, { disk }) },
    { id: 'clone', label: 'Clone…', run: () => openDialog(CreateDiskDialog, { cloneOf: disk }) },
    !disk.attached_to && deletion('disks', disk, 'Everything on it is lost. This cannot be taken back.'),
  ].filter(Boolean);
}

export const createImage = () => openDialog(CreateImageDialog);
export const createDisk = () => openDialog(CreateDiskDialog);
export const createNetwork = () => openDialog(CreateNetworkDialog);
export const createVm = () => openDialog(CreateVmDialog);
export const addHost = () => openDialog(AddHostDialog);

/** Plans and, when the operator agrees, starts a maintenance; then shows it. */
export async function maintain(host) {
  const started = await openDialog(MaintenanceDialog, { host });
  if (started) go('maintenance', started.id);
}

/** Lets a host's VMs go on in VMMs of its agent's program, when the operator agrees. */
export async function upgrade(host) {
  if (!await openDialog(UpgradeDialog, { host })) return;
  await perform(`Upgrade ${host.name}`, () => post(`/v1/hosts/${host.id}/upgrade`));
}

/** `what` names it for the operator, such as "Migrate web-1". */
export const cancelOperation = (id, what) => perform(`Cancel: ${what}`, () => post(`/v1/operations/${id}/cancel`), 'requested');
