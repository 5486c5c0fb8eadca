// Adding a host: a one-time token and the command to run there.

import { html, useEffect, useRef, useState } from '../lib/ui.js';
import { post } from '../lib/api.js';
import { between } from '../lib/format.js';
import { hosts } from '../lib/pool.js';
import { useStore } from '../lib/store.js';
import { useNow } from '../lib/clock.js';
import { CopyField } from '../parts/copy.js';
import { Dialog } from '../parts/dialog.js';
import { ProblemNote } from '../parts/problem.js';
import { State } from '../parts/state.js';
import { useRequest } from './form.js';

export function AddHostDialog({ close }) {
  const pool = useStore();
  const now = useNow();
  const before = useRef(new Set(pool.host.keys()));
  const [token, setToken] = useState(null);
  const [busy, problem, run] = useRequest();
  const create = () => run(async () => setToken(await post('/v1/join-tokens')));
  useEffect(() => {
    create();
  }, []);
  const joined = hosts(pool).filter((host) => !before.current.has(host.id));
  const expired = token && new Date(token.expires_at) <= now;
  return html`<${Dialog} title="Add a host" close=${close} width="wide" testid="add-host">
    <div class="dialog-body">
      <p class="lead">Run this on the new host, as root. The host gets a certificate of this pool and is ready for VMs a moment later.</p>
      <${ProblemNote} problem=${problem} />
      ${token && html`<${CopyField} text=${token.command} label="Command for the new host" testid="join-command" />
        <p class="quiet">${expired ? 'The token has expired; create another.' : html`The token in it works once, for <span
          class="number-left">${between(now, token.expires_at)}</span> more. It is shown only now.`}</p>
        <p class="waiting" role="status" data-testid="join-status">${joined.length === 0
          ? html`<span class="dot dot-busy" aria-hidden="true"></span>Waiting for the host to join…`
          : joined.map((host) => html`<span key=${host.id}><strong>${host.name}</strong> <${State} kind="host" state=${host.state} />
            </span>`)}</p>`}
    </div>
    <footer class="dialog-foot">
      ${(problem || expired || joined.length > 0) && html`<button type="button" class="button" disabled=${busy}
        onClick=${() => { before.current = new Set(pool.host.keys()); create(); }}>Create another token</button>`}
      <button type="button" class="button button-primary" onClick=${() => close()}>${joined.length ? 'Done' : 'Close'}</button>
    </footer>
  <//>`;
}
