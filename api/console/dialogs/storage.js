// Importing images, making and growing disks.

import { html, useState } from '../lib/ui.js';
import { post, upload } from '../lib/api.js';
import { bytes } from '../lib/format.js';
import { hosts, images, pools } from '../lib/pool.js';
import { store } from '../lib/store.js';
import { Dialog } from '../parts/dialog.js';
import { Field, fieldError } from '../parts/field.js';
import { notify, perform } from '../parts/notices.js';
import { ProblemNote } from '../parts/problem.js';
import { useRequest } from './form.js';

const GIB = 2 ** 30;

function Frame({ title, close, busy, verb, problem, submit, testid, children }) {
  return html`<${Dialog} title=${title} close=${close} width="wide" testid=${testid}>
    <form onSubmit=${(event) => { event.preventDefault(); submit(); }} class="dialog-form">
      <div class="dialog-body"><div class="fields">${children}</div>
        <${ProblemNote} problem=${problem?.fields?.length ? null : problem} /></div>
      <footer class="dialog-foot">
        <button type="button" class="button" onClick=${() => close()}>Cancel</button>
        <button type="submit" class="button button-primary" disabled=${busy} data-testid="${testid}-submit">${busy ? 'One moment…' : verb}</button>
      </footer>
    </form>
  <//>`;
}

const useForm = (initial) => {
  const [form, setForm] = useState(initial);
  const bind = (name) => ({ name, value: form[name], onInput: (event) => setForm({ ...form, [name]: event.target.value }) });
  return [form, bind, setForm];
};

/** A choice of pool; nothing chosen leaves it to the server. */
export function PoolField({ bind, error }) {
  return html`<${Field} label="Storage pool" hint="the only one there is, if none is chosen" error=${error}><select ...${bind('pool')}>
    <option value="">Let Godwit choose</option>${pools(store).map((pool) => html`<option key=${pool.id} value=${pool.id}>${pool.name}
      (${bytes(pool.free_bytes)} free${pool.shared ? '' : `, only ${pool.hosts[0]?.host_name}`})</option>`)}</select><//>`;
}

export function CreateImageDialog({ close }) {
  const [form, bind, setForm] = useForm({ name: '', from: 'upload', path: '', host: '', pool: '', sha256: '' });
  const [file, setFile] = useState(null);
  const [busy, problem, run] = useRequest();
  const error = (path) => fieldError(problem, path);
  const submit = () => run(async () => {
    const source = form.from === 'upload' ? { kind: 'upload', bytes: file?.size ?? 0 }
      : { kind: 'path', path: form.path, ...(form.host ? { host: form.host } : {}) };
    const body = { name: form.name, source, ...(form.pool ? { pool: form.pool } : {}), ...(form.sha256 ? { sha256: form.sha256.trim() } : {}) };
    const { image } = await post('/v1/images', body);
    close();
    notify({ tone: 'ok', text: form.from === 'upload' ? `${form.name} is being uploaded; keep this page open` : `${form.name} is being imported` });
    if (form.from === 'upload') await perform(`Upload ${form.name}`, () => upload(`/v1/images/${image.id}/content`, file), 'all of it has arrived');
  });
  return html`<${Frame} title="Import an image" verb="Import" testid="create-image" ...${{ close, busy, problem, submit }}>
    <${Field} label="Name" hint="a–z, digits, dots and dashes" error=${error('name')} wide>
      <input ...${bind('name')} required autofocus autocomplete="off" spellcheck=${false} maxlength="63" /><//>
    <${Field} label="From"><select ...${bind('from')}><option value="upload">A file on this computer</option>
      <option value="path">A file on a host</option></select><//>
    <${PoolField} bind=${bind} error=${error('pool')} />
    ${form.from === 'upload'
      ? html`<${Field} label="File" hint="raw or qcow2" error=${error('source.bytes')} wide>
        <input type="file" required onChange=${(event) => {
          const chosen = event.target.files[0];
          setFile(chosen);
          if (chosen && !form.name) setForm({ ...form, name: chosen.name.toLowerCase().replace(/\.(qcow2|raw|img)$/, '').replace(/[^a-z0-9.-]/g, '-') });
        }} /><//>`
      : html`<${Field} label="Path" hint="raw or qcow2" error=${error('source.path')} wide>
          <input ...${bind('path')} required placeholder="/var/tmp/debian-13.qcow2" spellcheck=${false} /><//>
        <${Field} label="Host" error=${error('source.host') ?? error('host')}><select ...${bind('host')}>
          <option value="">Any that has the pool</option>${hosts(store).map((host) => html`<option key=${host.id}>${host.name}</option>`)}
          </select><//>`}
    <${Field} label="SHA-256" hint="checked, if given" error=${error('sha256')} wide><input ...${bind('sha256')} spellcheck=${false} /><//>
  <//>`;
}

export function CreateDiskDialog({ close, cloneOf }) {
  const [form, bind] = useForm({ name: cloneOf ? `${cloneOf.name}-copy` : '', image: '', size: '', pool: '' });
  const [busy, problem, run] = useRequest();
  const error = (path) => fieldError(problem, path);
  const submit = () => run(async () => {
    const body = { name: form.name,
      ...(cloneOf ? { clone_of: cloneOf.id } : {}), ...(form.image ? { image: form.image } : {}),
      ...(form.size ? { bytes: Math.round(Number(form.size) * GIB) } : {}), ...(form.pool ? { pool: form.pool } : {}) };
    await post('/v1/disks', body);
    close();
    notify({ tone: 'ok', text: `${form.name} is being made` });
  });
  return html`<${Frame} title=${cloneOf ? `Clone ${cloneOf.name}` : 'Create a disk'} verb=${cloneOf ? 'Clone' : 'Create disk'}
    testid="create-disk" ...${{ close, busy, problem, submit }}>
    <${Field} label="Name" hint="a–z, digits, dots and dashes" error=${error('name')} wide>
      <input ...${bind('name')} required autofocus autocomplete="off" spellcheck=${false} maxlength="63" /><//>
    ${!cloneOf && html`<${Field} label="Content" error=${error('image')}><select ...${bind('image')}><option value="">Blank</option>
      ${images(store).filter((image) => image.state === 'ready').map((image) => html`<option key=${image.id} value=${image.id}>Copy of ${image.name}
      </option>`)}</select><//>`}
    <${Field} label="Size, GiB" hint=${form.image || cloneOf ? 'as large as its origin, if empty' : ''} error=${error('bytes') ?? error('clone_of')}>
      <input ...${bind('size')} type="number" min="0.01" step="any" required=${!form.image && !cloneOf} /><//>
    ${!form.image && !cloneOf && html`<${PoolField} bind=${bind} error=${error('pool')} />`}
  <//>`;
}

export function GrowDiskDialog({ close, disk }) {
  const [form, bind] = useForm({ size: String(Math.ceil((disk.bytes ?? 0) / GIB) + 1) });
  const [busy, problem, run] = useRequest();
  const submit = () => run(async () => {
    await post(`/v1/disks/${disk.id}/grow`, { bytes: Math.round(Number(form.size) * GIB) });
    close();
    notify({ tone: 'ok', text: `${disk.name} grows` });
  });
  return html`<${Frame} title="Grow ${disk.name}" verb="Grow" testid="grow-disk" ...${{ close, busy, problem, submit }}>
    <${Field} label="New size, GiB" hint="it has ${bytes(disk.bytes)}; a VM that runs with it sees the new size at once"
      error=${fieldError(problem, 'bytes')} wide>
      <input ...${bind('size')} type="number" min="0.01" step="any" required autofocus /><//>
  <//>`;
}
