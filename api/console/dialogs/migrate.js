// Moving one VM: the hosts it can go to, and why not to the others.

import { html, useState } from '../lib/ui.js';
import { post, tryPost } from '../lib/api.js';
import { mib, percent } from '../lib/format.js';
import { hosts } from '../lib/pool.js';
import { useStore } from '../lib/store.js';
import { Dialog } from '../parts/dialog.js';
import { Field, fieldError } from '../parts/field.js';
import { Forecast } from '../parts/forecast.js';
import { perform } from '../parts/notices.js';
import { Loading } from '../parts/placeholder.js';
import { ProblemNote } from '../parts/problem.js';
import { useAnswer } from './form.js';

const DOWNTIME_LIMIT_MS = 300;
const MAX_THROTTLE_PERCENT = 80;
const MIB = 2 ** 20;
/** The guest is watched for each question, so the form must have come to rest. */
const ASK_AFTER_MS = 600;

export function MigrateDialog({ vm, close }) {
  const pool = useStore();
  const [target, setTarget] = useState('');
  const [limit, setLimit] = useState(String(DOWNTIME_LIMIT_MS));
  const [bandwidth, setBandwidth] = useState('');
  const [throttle, setThrottle] = useState(String(MAX_THROTTLE_PERCENT));
  const [deadline, setDeadline] = useState('');
  const [compress, setCompress] = useState(true);
  const [verify, setVerify] = useState(false);
  const [postCopy, setPostCopy] = useState(false);
  const [withDisks, setWithDisks] = useState(false);
  const forbidden = vm.post_copy === 'forbidden';
  const path = `/v1/vms/${vm.id}/migrate`;
  const policy = {
    downtime_limit_ms: Number(limit),
    max_throttle_percent: Number(throttle),
    compression: compress ? 'auto' : 'off',
    verify: verify ? 'whole_memory' : 'frames',
    ...(bandwidth ? { max_bandwidth_bytes_per_s: Number(bandwidth) * MIB } : {}),
    ...(postCopy && !forbidden ? { allow_postcopy: true } : {}),
    ...(deadline ? { deadline_s: Number(deadline) } : {}),
  };
  const along = withDisks ? { disks: 'along' } : {};
  const body = { ...(target ? { target } : {}), policy, ...along };
  // Where it could go depends on whether its disks go with it and on nothing else; what will become of it does.
  const dry = useAnswer(`${vm.id} ${withDisks}`, (signal) => tryPost(path, along, signal));
  const asked = JSON.stringify(body);
  const [usual] = useState(asked);
  // What is usual has been asked for already.
  const ask = (signal) => (asked === usual ? Promise.resolve(null) : tryPost(path, body, signal));
  const look = useAnswer(`${vm.id} ${asked}`, ask, ASK_AFTER_MS);
  const forecast = (asked === usual ? dry : look).answer?.forecast;
  const placement = dry.answer?.placement;
  const others = hosts(pool).filter((host) => host.id !== vm.host);
  const nowhere = others.length === 0;
  const submit = (event) => {
    event.preventDefault();
    close();
    perform(`Migrate ${vm.name}`, () => post(path, body));
  };
  return html`<${Dialog} title="Migrate ${vm.name}" close=${close} testid="migrate">
    <form onSubmit=${submit} class="dialog-form">
      <div class="dialog-body">
        <p class="lead">It moves from <strong>${vm.host_name}</strong> without stopping.</p>
        ${dry.busy ? html`<${Loading} />` : html`<fieldset class="options">
          <legend>Where to</legend>
          <label class="option">
            <input type="radio" name="target" value="" checked=${target === ''} onChange=${() => setTarget('')} />
            <span class="option-main">Let Godwit choose</span>
              <span class="option-note">${placement?.host ? `it would choose ${placement.host_name}` : ''}</span>
          </label>
          ${others.map((host) => html`<${Target} key=${host.id} host=${host}
            rejection=${placement?.rejections.find((rejection) => rejection.host === host.id)} chosen=${target === host.id}
            choose=${setTarget} />`)}
        </fieldset>`}
        <label class="check">
          <input type="checkbox" checked=${withDisks} data-testid="migrate-with-disks"
            onChange=${(event) => setWithDisks(event.target.checked)} /> Take disks along that the target does not see</label>
        <details class="advanced">
          <summary>Limits</summary>
          <div class="fields">
            <${Field} label="Longest blackout, ms" hint="the guest is paused once the rest fits into this"
              error=${fieldError(look.problem, 'policy.downtime_limit_ms')}>
              <input type="number" min="1" max="60000" value=${limit} onInput=${(event) => setLimit(event.target.value)} /><//>
            <${Field} label="Slow the guest by at most, %" hint="only when it changes memory faster than it can be sent; 0 never slows it">
              <input type="number" min="0" max="99" value=${throttle} onInput=${(event) => setThrottle(event.target.value)} /><//>
            <${Field} label="Most bandwidth, MiB/s" hint="empty means no limit">
              <input type="number" min="1" value=${bandwidth} onInput=${(event) => setBandwidth(event.target.value)} /><//>
            <${Field} label="Ends within, s" hint="empty means no deadline">
              <input type="number" min="1" value=${deadline} onInput=${(event) => setDeadline(event.target.value)} /><//>
            <label class="check">
              <input type="checkbox" checked=${compress}
                onChange=${(event) => setCompress(event.target.checked)} /> Compress pages where that is faster</label>
            <label class="check">
              <input type="checkbox" checked=${postCopy} disabled=${verify || forbidden} data-testid="migrate-post-copy"
                onChange=${(event) => setPostCopy(event.target.checked)} /> ${forbidden ? 'Post-copy is forbidden for this VM'
                : 'Let it run there before all of its memory has followed (until then the loss of either host loses it)'}</label>
            <label class="check">
              <input type="checkbox" checked=${verify}
                disabled=${postCopy} onChange=${(event) => setVerify(event.target.checked)} /> Compare a hash of all memory (lengthens the blackout)</label>
          </div>
        </details>
        ${forecast && html`<${Forecast} forecast=${forecast} busy=${look.busy} />`}
        <${ProblemNote} problem=${dry.problem ?? look.problem} />
      </div>
      <footer class="dialog-foot">
        <button type="button" class="button" onClick=${() => close()}>Cancel</button>
        <button type="submit" class="button button-primary" disabled=${dry.busy || nowhere || Boolean(dry.problem)}
          data-testid="migrate-submit">Migrate</button>
      </footer>
    </form>
  <//>`;
}

function Target({ host, rejection, chosen, choose }) {
  const free = host.capacity.guest_memory_mib - host.committed.memory_mib;
  return html`<label class="option ${rejection ? 'is-off' : ''}" title=${rejection?.remedy} data-testid="target-${host.name}">
    <input type="radio" name="target" value=${host.id} checked=${chosen} disabled=${Boolean(rejection)} onChange=${() => choose(host.id)} />
    <span class="option-main">${host.name}</span>
    <span class="option-note">${rejection ? rejection.detail : `${mib(Math.max(0, free))} free, CPU ${percent(host.usage?.cpu_percent)}`}</span>
  </label>`;
}
