// Calling a maintenance off, with the choice of what becomes of the VMs that have left.

import { html, useState } from '../lib/ui.js';
import { Dialog } from '../parts/dialog.js';

/** Closes with `{restore}`, or nothing when the maintenance goes on. */
export function CancelMaintenanceDialog({ maintenance, away, close }) {
  const [restore, setRestore] = useState(true);
  const submit = (event) => {
    event.preventDefault();
    close({ restore });
  };
  return html`<${Dialog} title="Cancel the maintenance of ${maintenance.host_name}?" close=${close} testid="maintenance-cancel-dialog">
    <form onSubmit=${submit} class="dialog-form">
      <div class="dialog-body">
        <p class="lead">The move in flight is finished, then the host takes VMs again.</p>
        ${away > 0 && html`<fieldset class="options">
          <legend>VMs that have left already (${away})</legend>
          <label class="option"><input type="radio" name="restore" checked=${restore} onChange=${() => setRestore(true)} />
            <span class="option-main">Bring them home</span></label>
          <label class="option"><input type="radio" name="restore" checked=${!restore} onChange=${() => setRestore(false)} />
            <span class="option-main">Leave them where they are</span></label>
        </fieldset>`}
      </div>
      <footer class="dialog-foot">
        <button type="button" class="button" autofocus onClick=${() => close()}>Go on with it</button>
        <button type="submit" class="button button-danger" data-testid="maintenance-cancel-yes">Cancel the maintenance</button>
      </footer>
    </form>
  <//>`;
}
