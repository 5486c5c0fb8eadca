// Questions about the pool, answered from the store's content alone (pure functions).

import { count, sentence, words } from './format.js';

const GIB_IN_MIB = 1024;
/** Share of the last ten seconds in which work stalled, from which a host counts as under pressure. */
const PRESSURE_PERCENT = 20;
/** Share of a host's memory in use from which it counts as almost full. */
const MEMORY_FULL_SHARE = 0.95;
const RECENT_MS = 15 * 60_000;

const MIGRATION_ENDS = ['completed', 'failed', 'cancelled'];
const MAINTENANCE_ENDS = ['done', 'cancelled'];
const VM_TROUBLE = { failed: 'has failed', unreachable: 'is on a host that does not answer', awaiting_fence: 'waits for proof that its host is off' };

const byName = (a, b) => a.name.localeCompare(b.name, 'en', { numeric: true });
const newestFirst = (field) => (a, b) => String(b[field] ?? '').localeCompare(String(a[field] ?? ''));

export const hosts = (pool) => [...pool.host.values()].sort(byName);
export const images = (pool) => [...pool.image.values()].sort(byName);
export const disks = (pool) => [...pool.disk.values()].sort(byName);
export const networks = (pool) => [...pool.network.values()].sort(byName);
export const pools = (pool) => [...pool.pool.values()].sort(byName);
export const vms = (pool) => [...pool.vm.values()].sort(byName);

/** The item of `kind` with this id or name. */
export function find(pool, kind, idOrName) {
  return pool[kind].get(idOrName) ?? [...pool[kind].values()].find((item) => item.name === idOrName);
}

/** Whether it is under way: not decided, or decided while memory still follows the guest. */
export const isMoving = (migration) => Boolean(migration)
  && ((migration.state === 'open' && !MIGRATION_ENDS.includes(migration.phase)) || memoryFollows(migration));

/** Whether the guest runs at the target and some of its memory is still at the source. */
export const memoryFollows = (migration) => migration.state === 'committed' && migration.phase === 'post_copy';

/** Whether the guest of a migration whose memory follows stands still, because the source cannot be reached. */
export const waitsForMemory = (vm) => vm.state === 'paused';

export const movingMigrations = (pool) => [...pool.migration.values()].filter(isMoving).sort(newestFirst('started_at')).reverse();

/** The migration this VM is in now, with the freshest figures known, or undefined. */
export function migrationOf(pool, vm) {
  const inVm = vm.migration;
  const known = inVm ? (pool.migration.get(inVm.id) ?? inVm) : [...pool.migration.values()].find((m) => m.vm === vm.id && isMoving(m));
  return isMoving(known) ? known : undefined;
}

export const migrationsOf = (pool, vmId) => [...pool.migration.values()].filter((m) => m.vm === vmId).sort(newestFirst('started_at'));

/** VMs on a host, and those on their way to it. */
export function guestsOf(pool, host) {
  const here = vms(pool).filter((vm) => vm.host === host.id);
  const coming = movingMigrations(pool).filter((m) => m.target === host.id && !here.some((vm) => vm.id === m.vm));
  return { here, coming };
}

export const isOpen = (maintenance) => !MAINTENANCE_ENDS.includes(maintenance.state);
export const maintenances = (pool) => [...pool.maintenance.values()].sort(newestFirst('created_at'));
export const maintenanceOf = (pool, host) => maintenances(pool).find((m) => m.host === host.id && isOpen(m));

export const isRunning = (operation) => operation.state === 'pending' || operation.state === 'running';
export const operations = (pool) => [...pool.operation.values()].sort(newestFirst('created_at'));

/** What the pool has and what of it is in use, over hosts that answer. */
export function capacity(pool) {
  const total = { cores: 0, busyCores: 0, memoryMib: 0, usedMib: 0, guestMib: 0, committedMib: 0, vcpus: 0 };
  for (const host of pool.host.values()) {
    if (host.state === 'unreachable' || host.state === 'joining') continue;
    total.cores += host.capacity.cores;
    total.busyCores += (host.capacity.cores * (host.usage?.cpu_percent ?? 0)) / 100;
    total.memoryMib += host.facts?.memory_mib ?? 0;
    total.usedMib += (host.usage?.memory_used_bytes ?? 0) / 2 ** 20;
    total.guestMib += host.capacity.guest_memory_mib;
    total.committedMib += host.committed.memory_mib;
    total.vcpus += host.committed.vcpus;
  }
  return total;
}

/** "3 hosts up, 5 of 6 VMs running (1 paused)". */
export function census(pool) {
  const all = [...pool.host.values()];
  const guests = [...pool.vm.values()];
  const up = all.filter((host) => host.state !== 'unreachable' && host.state !== 'joining').length;
  const running = guests.filter((vm) => vm.state === 'running' || vm.state === 'migrating').length;
  const of = (number, whole, one) => (number === whole ? count(whole, one) : `${number} of ${count(whole, one)}`);
  const others = Map.groupBy(guests.filter((vm) => vm.state !== 'running' && vm.state !== 'migrating'), (vm) => vm.state);
  const rest = [...others].sort().map(([state, vms]) => `${vms.length} ${words(state)}`).join(', ');
  return `${of(up, all.length, 'host')} up, ${of(running, guests.length, 'VM')} running${rest && ` (${rest})`}`;
}

/** What an operator should look at, worst first: `{severity, key, text, detail, view, id}`. */
export function attention(pool, now = Date.now()) {
  const found = [
    ...hosts(pool).flatMap((host) => hostAttention(pool, host)),
    ...vms(pool).flatMap((vm) => vmAttention(pool, vm)),
    ...maintenances(pool).flatMap(maintenanceAttention),
    ...operations(pool).flatMap((operation) => operationAttention(operation, now)),
    ...reserveAttention(pool),
  ];
  const rank = { error: 0, warning: 1, info: 2 };
  return found.sort((a, b) => rank[a.severity] - rank[b.severity]);
}

function hostAttention(pool, host) {
  const about = (severity, text, detail) => ({ severity, key: `host-${host.id}-${text}`, text, detail, view: 'hosts', id: host.name });
  if (host.state === 'unreachable') {
    const { here } = guestsOf(pool, host);
    const affected = here.length ? ` and has ${count(here.length, 'VM')}` : '';
    return [about('error', `Host ${host.name} does not answer${affected}`, host.reason)];
  }
  const found = [];
  if (host.state === 'cordoned' && !maintenanceOf(pool, host)) {
    found.push(about('info', `Host ${host.name} is cordoned`, 'it takes no new VMs until it is uncordoned'));
  }
  if (host.usage.memory_used_bytes > MEMORY_FULL_SHARE * host.facts.memory_mib * 2 ** 20) {
    found.push(about('warning', `Host ${host.name} is almost out of memory`, 'move VMs away before it has to reclaim memory from guests'));
  }
  const { pressure } = host.usage;
  if (pressure.memory_percent >= PRESSURE_PERCENT) {
    const stalled = `work stalled on memory ${Math.round(pressure.memory_percent)} % of the time; move VMs away`;
    found.push(about('warning', `Host ${host.name} is short of memory`, stalled));
  }
  if (host.committed.memory_mib > host.capacity.guest_memory_mib) {
    found.push(about('warning', `Host ${host.name} has promised more memory than it has`, 'move VMs away before their guests ask for all of it'));
  }
  return found;
}

function vmAttention(pool, vm) {
  const trouble = VM_TROUBLE[vm.state];
  // A silent host is told once, with the number of its VMs.
  const toldAlready = vm.state === 'unreachable' && pool.host.get(vm.host)?.state === 'unreachable';
  if (!trouble || toldAlready) return [];
  return [{ severity: 'error', key: `vm-${vm.id}`, text: `VM ${vm.name} ${trouble}`, detail: vm.reason, view: 'vms', id: vm.name }];
}

function maintenanceAttention(maintenance) {
  const about = (severity, text, detail) => [{ severity, key: `maintenance-${maintenance.id}`, text, detail, view: 'maintenance', id: maintenance.id }];
  if (maintenance.state === 'blocked') {
    return about('warning', `Maintenance of ${maintenance.host_name} is blocked`, maintenance.plan.blockers[0]?.detail ?? maintenance.detail);
  }
  if (maintenance.state === 'failed') {
    return about('error', `Maintenance of ${maintenance.host_name} could not go on`, maintenance.detail ?? 'the host stays cordoned; try again or cancel it');
  }
  if (maintenance.state === 'drained' || maintenance.state === 'working') {
    return about('info', `Host ${maintenance.host_name} is empty and yours to work on`, 'finish the maintenance to bring its VMs home');
  }
  return [];
}

function operationAttention(operation, now) {
  if (operation.state !== 'failed' || now - new Date(operation.ended_at ?? operation.created_at) > RECENT_MS) return [];
  return [{ severity: 'warning', key: `operation-${operation.id}`, text: `${operationTitle(operation)} failed`,
    detail: operation.error?.detail, view: 'operations', id: operation.id }];
}

/** Whether the guests of the fullest host would find room on the others. */
function reserveAttention(pool) {
  const up = hosts(pool).filter((host) => host.state === 'up');
  if (up.length < 2) return [];
  const fullest = up.reduce((a, b) => (b.committed.memory_mib > a.committed.memory_mib ? b : a));
  const room = up.filter((host) => host !== fullest).reduce((sum, host) => sum + Math.max(0, host.capacity.guest_memory_mib - host.committed.memory_mib), 0);
  const lacking = fullest.committed.memory_mib - room;
  if (lacking <= 0) return [];
  const amount = lacking >= GIB_IN_MIB ? `${(lacking / GIB_IN_MIB).toFixed(1)} GiB` : `${lacking} MiB`;
  return [{ severity: 'warning', key: 'reserve', text: `If ${fullest.name} fails, its VMs do not all fit elsewhere`,
    detail: `${amount} of guest memory is lacking; add a host or stop a VM`, view: 'hosts', id: null }];
}

/** "Migrate web-1". */
export function operationTitle(operation) {
  return `${sentence(operation.kind)} ${operation.subject.name}`;
}

/** Where an event's or operation's subject is shown: `[view, id]`, or null. */
export function subjectRoute(subject) {
  if (subject.kind === 'vm') return ['vms', subject.name];
  if (subject.kind === 'host') return ['hosts', subject.name];
  if (subject.kind === 'network') return ['networks', subject.name];
  if (subject.kind === 'image') return ['images', null];
  if (subject.kind === 'disk') return ['disks', null];
  if (subject.kind === 'maintenance') return ['maintenance', subject.id];
  return null;
}
