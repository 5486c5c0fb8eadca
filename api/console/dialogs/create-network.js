// Making a network.

import { html, useState } from '../lib/ui.js';
import { post } from '../lib/api.js';
import { Dialog } from '../parts/dialog.js';
import { Field, fieldError } from '../parts/field.js';
import { notify } from '../parts/notices.js';
import { ProblemNote } from '../parts/problem.js';
import { useRequest } from './form.js';

const NEW = { name: '', kind: 'vxlan', vni: '100', uplink: '', tag: '', bridge: '', cidr: '', gateway: '', dns: '' };

function request(form) {
  const transport = { kind: form.kind };
  if (form.kind === 'vxlan') transport.vni = Number(form.vni);
  if (form.kind === 'vlan') Object.assign(transport, { uplink: form.uplink, tag: Number(form.tag) });
  if (form.kind === 'bridge') transport.bridge = form.bridge;
  const dns = form.dns.split(/[\s,]+/).filter(Boolean);
  const subnet = form.cidr && { cidr: form.cidr, ...(form.gateway ? { gateway: form.gateway } : {}), ...(dns.length ? { dns } : {}) };
  return { name: form.name, transport, ...(subnet ? { subnet } : {}) };
}

export function CreateNetworkDialog({ close }) {
  const [form, setForm] = useState(NEW);
  const [busy, problem, run] = useRequest();
  const bind = (name) => ({ name, value: form[name], onInput: (event) => setForm({ ...form, [name]: event.target.value }) });
  const error = (path) => fieldError(problem, path);
  const submit = (event) => {
    event.preventDefault();
    run(async () => {
      await post('/v1/networks', request(form));
      close();
      notify({ tone: 'ok', text: `${form.name} is created` });
    });
  };
  return html`<${Dialog} title="Create a network" close=${close} width="wide" testid="create-network">
    <form onSubmit=${submit} class="dialog-form">
      <div class="dialog-body"><div class="fields">
        <${Field} label="Name" hint="a–z, digits, dots and dashes" error=${error('name')} wide>
          <input ...${bind('name')} required autofocus autocomplete="off" spellcheck=${false} maxlength="63" /><//>
        <${Field} label="Reaches hosts by" error=${error('transport')}><select ...${bind('kind')}>
          <option value="vxlan">VXLAN between the hosts</option><option value="vlan">VLAN of the physical network</option>
          <option value="bridge">Bridge that exists on every host</option><option value="local">Nothing: each host by itself</option></select><//>
        ${form.kind === 'vxlan' && html`<${Field} label="Identifier (VNI)" error=${error('transport.vni')}>
          <input ...${bind('vni')} type="number" min="1" max="16777215" required /><//>`}
        ${form.kind === 'vlan' && html`<${Field} label="Tag" error=${error('transport.tag')}>
            <input ...${bind('tag')} type="number" min="1" max="4094" required /><//>
          <${Field} label="Interface" hint="on every host" error=${error('transport.uplink')}>
            <input ...${bind('uplink')} required placeholder="eth0" spellcheck=${false} /><//>`}
        ${form.kind === 'bridge' && html`<${Field} label="Bridge" error=${error('transport.bridge')}>
          <input ...${bind('bridge')} required placeholder="br0" spellcheck=${false} /><//>`}
        <${Field} label="Subnet" hint="addresses VMs are given; empty, if the network has its own" error=${error('subnet.cidr') ?? error('subnet.prefix')} wide>
          <input ...${bind('cidr')} placeholder="10.1.0.0/16" spellcheck=${false} /><//>
        ${form.cidr && html`<${Field} label="Router" error=${error('subnet.gateway')}><input ...${bind('gateway')} spellcheck=${false} /><//>
          <${Field} label="Name servers" error=${error('subnet.dns')}><input ...${bind('dns')} spellcheck=${false} /><//>`}
      </div><${ProblemNote} problem=${problem?.fields?.length ? null : problem} /></div>
      <footer class="dialog-foot">
        <button type="button" class="button" onClick=${() => close()}>Cancel</button>
        <button type="submit" class="button button-primary" disabled=${busy} data-testid="create-network-submit">${busy ? 'Creating…' : 'Create network'}</button>
      </footer>
    </form>
  <//>`;
}
