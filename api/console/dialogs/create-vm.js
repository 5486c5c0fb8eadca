// Creating a VM, with the host it would be placed on shown while the form is filled in.

import { html, useState } from '../lib/ui.js';
import { post, tryPost } from '../lib/api.js';
import { hosts, images, networks } from '../lib/pool.js';
import { go } from '../lib/router.js';
import { store } from '../lib/store.js';
import { Dialog } from '../parts/dialog.js';
import { Field, fieldError } from '../parts/field.js';
import { notify } from '../parts/notices.js';
import { ProblemNote } from '../parts/problem.js';
import { useAnswer, useRequest } from './form.js';

const ASK_AFTER_MS = 350;
const NEW = { name: '', vcpus: 1, memory: 64, boot: 'pilot', kernel: '', initrd: '', cmdline: 'console=ttyS0', cpu: 'x86-64-v2', host: '',
  lease: 'watched', policy: 'migrate', postCopy: 'allowed', start: true, image: '', imageSize: '', disk: '', network: '', sshKey: '', userData: '' };
const GIB = 2 ** 30;

const size = (gib) => (gib ? { bytes: Math.round(Number(gib) * GIB) } : {});

function devices(form) {
  const disks = [form.image && { name: 'root', image: form.image, ...size(form.imageSize) }, form.disk && size(form.disk)].filter(Boolean);
  const keys = form.sshKey.split('\n').map((line) => line.trim()).filter(Boolean);
  const seed = form.image || keys.length > 0 || form.userData;
  return {
    ...(disks.length ? { disks } : {}),
    ...(form.network ? { nics: [{ network: form.network }] } : {}),
    ...(seed ? { cloud_init: { ssh_keys: keys, ...(form.userData ? { user_data: form.userData } : {}) } } : {}),
  };
}

function request(form) {
  const boot = form.boot === 'pilot' ? { kind: 'pilot' } : { kind: 'linux',
    kernel: form.kernel, ...(form.initrd ? { initrd: form.initrd } : {}), cmdline: form.cmdline };
  return {
    name: form.name,
    spec: { vcpus: Number(form.vcpus), memory_mib: Number(form.memory), boot, cpu: form.cpu },
    ...devices(form),
    start: form.start,
    ...(form.host ? { host: form.host } : {}),
    lease: form.lease,
    maintenance_policy: form.policy,
    post_copy: form.postCopy,
  };
}

export function CreateVmDialog({ close }) {
  const [form, setForm] = useState(NEW);
  const [busy, refused, run] = useRequest();
  const dry = useAnswer(JSON.stringify(form), (signal) => (form.name ? tryPost('/v1/vms', request(form), signal) : Promise.resolve(null)), ASK_AFTER_MS);
  const problem = refused ?? dry.problem;
  const bind = (field) => ({ name: field, value: form[field], onInput: (event) => setForm({ ...form, [field]: event.target.value }) });
  const error = (path) => fieldError(problem, path);
  const submit = (event) => {
    event.preventDefault();
    run(async () => {
      await post('/v1/vms', request(form));
      close();
      notify({ tone: 'ok', text: `${form.name} is created` });
      go('vms', form.name);
    });
  };
  return html`<${Dialog} title="Create a VM" close=${close} width="wide" testid="create-vm">
    <form onSubmit=${submit} class="dialog-form">
      <div class="dialog-body">
        <div class="fields">
          <${Field} label="Name" hint="a–z, digits, dots and dashes" error=${error('name')} wide>
            <input ...${bind('name')} required autofocus autocomplete="off" spellcheck=${false} maxlength="63" data-testid="create-name" />
            <//>
          <${Field} label="vCPUs" hint="1 to 64" error=${error('spec.vcpus')}>
            <input ...${bind('vcpus')} type="number" min="1" max="64" required /><//>
          <${Field} label="Memory, MiB" hint="16 or more" error=${error('spec.memory_mib')}>
            <input ...${bind('memory')} type="number" min="16" step="1" required /><//>
          <${Field} label="Boots" error=${error('spec.boot')}><select ...${bind('boot')}>
            <option value="pilot">Pilot (built-in test guest)</option><option value="linux">Linux kernel</option></select><//>
          <${Field} label="CPU level" hint=${form.cpu === 'host' ? 'moves only between equal CPUs' : 'moves to any host that has it'}>
            <select ...${bind('cpu')}><option value="x86-64-v2">x86-64-v2</option><option value="x86-64-v3">x86-64-v3</option>
            <option value="x86-64-v4">x86-64-v4</option><option value="host">host</option></select><//>
          ${form.boot === 'linux' && html`
            <${Field} label="Kernel" hint="path of a bzImage or vmlinux on the hosts" error=${error('spec.boot.kernel')} wide>
              <input ...${bind('kernel')} required placeholder="/var/lib/godwit/vmlinux" spellcheck=${false} /><//>
            <${Field} label="Initial RAM disk" hint="path on the hosts, if it needs one" error=${error('spec.boot.initrd')} wide>
              <input ...${bind('initrd')} spellcheck=${false} /><//>
            <${Field} label="Kernel command line" error=${error('spec.boot.cmdline')} wide>
              <input ...${bind('cmdline')} spellcheck=${false} /><//>`}
          <${Field} label="First disk" hint="a thin copy of an image" error=${error('disks[0].image')}><select ...${bind('image')} data-testid="create-image">
            <option value="">None</option>${images(store).filter((image) => image.state === 'ready').map((image) => html`<option key=${image.id}
              value=${image.name}>${image.name}</option>`)}</select><//>
          ${form.image && html`<${Field} label="Its size, GiB" hint="the image's, if empty" error=${error('disks[0].bytes')}>
            <input ...${bind('imageSize')} type="number" min="0.01" step="any" /><//>`}
          <${Field} label=${form.image ? 'Second disk, GiB' : 'Blank disk, GiB'} hint="none, if empty"
            error=${error(`disks[${form.image ? 1 : 0}].bytes`) ?? error(`disks[${form.image ? 1 : 0}].pool`)}>
            <input ...${bind('disk')} type="number" min="0.01" step="any" data-testid="create-disk" /><//>
          <${Field} label="Network" hint="it gets the lowest free address" error=${error('nics[0].network') ?? error('nics[0].address')}>
            <select ...${bind('network')} data-testid="create-network"><option value="">None</option>${networks(store).map((network) => html`<option
              key=${network.id} value=${network.name}>${network.name}${network.subnet ? ` (${network.subnet.cidr})` : ''}</option>`)}</select><//>
          ${(form.image || form.sshKey || form.userData) && html`
            <${Field} label="SSH public keys" hint="for the image's default user, one in each line" error=${error('cloud_init.ssh_keys')} wide>
              <textarea ...${bind('sshKey')} rows="2" spellcheck=${false} placeholder="ssh-ed25519 AAAA… you@there"></textarea><//>
            <${Field} label="cloud-init user-data" error=${error('cloud_init.user_data')} wide>
              <textarea ...${bind('userData')} rows="2" spellcheck=${false} placeholder="#cloud-config"></textarea><//>`}
          <${Field} label="Host" error=${error('host')}><select ...${bind('host')}>
            <option value="">Let Godwit choose</option>${hosts(store).map((host) => html`<option key=${host.id}
              value=${host.name}>${host.name}</option>`)}</select>
            <//>
          <${Field} label="During maintenance"><select ...${bind('policy')}><option value="migrate">Move it live</option>
            <option value="restart_elsewhere">Restart it elsewhere</option>
            <option value="stop_and_return">Stop it, start it again afterwards</option><option value="block">Wait for the operator</option>
            </select><//>
          <${Field} label="Post-copy" hint="a move may let it run there before its memory has followed">
            <select ...${bind('postCopy')} data-testid="create-post-copy"><option value="allowed">Allowed where a move asks for it</option>
            <option value="forbidden">Forbidden</option></select><//>
          <${Field} label="If its host falls silent" wide><select ...${bind('lease')}>
            <option value="watched">Stop it there and start it elsewhere</option>
            <option value="unwatched">Let it run, never start it elsewhere without proof</option></select><//>
          <label class="check">
            <input type="checkbox" checked=${form.start}
              onChange=${(event) => setForm({ ...form, start: event.target.checked })} /> Start it at once</label>
        </div>
        <${Placement} dry=${dry} named=${Boolean(form.name)} />
        <${ProblemNote} problem=${refused ?? (dry.problem?.fields?.length ? null : dry.problem)} />
      </div>
      <footer class="dialog-foot">
        <button type="button" class="button" onClick=${() => close()}>Cancel</button>
        <button type="submit" class="button button-primary" disabled=${busy} data-testid="create-submit">${busy ? 'Creating…' : 'Create VM'}</button>
      </footer>
    </form>
  <//>`;
}

function Placement({ dry, named }) {
  if (!named || dry.problem) return null;
  const placement = dry.answer?.placement;
  if (!placement) return html`<p class="quiet" role="status">${dry.busy ? 'Looking for a place…' : ''}</p>`;
  return html`<div class="note" role="status">
    <p>It would be placed on <strong>${placement.host_name}</strong>.</p>
    ${placement.rejections.length > 0 && html`<ul>${placement.rejections.map((rejection) => html`<li
      key=${rejection.host}>${rejection.host_name}: ${rejection.detail}</li>`)}</ul>`}
  </div>`;
}
