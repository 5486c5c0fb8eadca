// How each state is coloured and worded. A tone is never the only sign: the word stands beside it.

const VM = {
  pending: 'idle', starting: 'busy', running: 'ok', paused: 'warn', migrating: 'busy', stopping: 'busy', stopped: 'idle',
  failed: 'bad', unreachable: 'bad', awaiting_fence: 'bad',
};
const HOST = { joining: 'busy', up: 'ok', cordoned: 'warn', maintenance: 'busy', unreachable: 'bad' };
const OPERATION = { pending: 'idle', running: 'busy', succeeded: 'ok', failed: 'bad', cancelled: 'idle' };
const MAINTENANCE = {
  planned: 'idle', blocked: 'warn', ready: 'idle', cordoned: 'busy', draining: 'busy', drained: 'ok', working: 'ok',
  verifying: 'busy', restoring: 'busy', done: 'ok', cancelling: 'busy', cancelled: 'idle', failed: 'bad',
};
const IMAGE = { importing: 'busy', uploading: 'busy', ready: 'ok', failed: 'bad' };
const DISK = { creating: 'busy', ready: 'ok', failed: 'bad' };
const SEVERITY = { info: 'idle', warning: 'warn', error: 'bad' };
const STEP = { running: 'busy', done: 'ok', failed: 'bad' };
const MOVE = { waiting: 'idle', moving: 'busy', away: 'ok', returned: 'ok', stayed: 'warn' };

const TONES = { vm: VM, host: HOST, operation: OPERATION, maintenance: MAINTENANCE, severity: SEVERITY, step: STEP, move: MOVE, image: IMAGE, disk: DISK };

/** `ok`, `busy`, `warn`, `bad` or `idle`. */
export function toneOf(kind, state) {
  return TONES[kind]?.[state] ?? 'idle';
}

const PHASES = {
  connecting: 'Connecting',
  pre_copy: 'Copying memory',
  blackout: 'Guest paused',
  awaiting_commit: 'Handing over',
  post_copy: 'Memory follows',
  completed: 'Completed',
  failed: 'Failed',
  cancelled: 'Cancelled',
};

export const PHASE_ORDER = ['connecting', 'pre_copy', 'blackout', 'awaiting_commit', 'post_copy', 'completed'];

/** What a migration's phase means to an operator. */
export function phaseWords(phase) {
  return PHASES[phase] ?? phase ?? 'Preparing';
}
