// A VM as a chip on its host, so that a migration is seen to cross.

import { classes, html, useEffect, useRef, useState } from '../lib/ui.js';
import { linkTo } from '../lib/router.js';
import { toneOf } from '../lib/tone.js';
import { migrationShare } from './migration.js';

const ARRIVAL_MS = 4000;
/** Where each VM was last drawn, to know that one has just arrived. */
const lastHost = new Map();

/** A VM on its host; `leaving` is its migration when it is on its way. */
export function VmChip({ vm, leaving }) {
  const arrived = useArrival(vm);
  return html`<a class=${classes('chip', `chip-${toneOf('vm', vm.state)}`, leaving && 'chip-leaving', arrived && 'chip-arrived')}
    href=${linkTo('vms', vm.name)} data-testid="chip-${vm.name}"
      title=${leaving ? `${vm.name} is moving to ${leaving.target_name}` : `${vm.name}: ${vm.state}`}>
    <span class="dot" aria-hidden="true"></span>${vm.name}
    ${leaving && html`<span class="chip-way" aria-hidden="true">→ ${leaving.target_name}</span>
      <span class="chip-fill" style=${{ transform: `scaleX(${migrationShare(leaving)})` }} aria-hidden="true"></span>`}
    ${leaving ? html`<span class="hidden">, moving to ${leaving.target_name}</span>` : vm.state !== 'running' && html`<span
      class="chip-state">${vm.state.replace('_', ' ')}</span>`}
  </a>`;
}

/** The place kept at the target for a VM that is on its way. */
export function ComingChip({ migration }) {
  return html`<a class="chip chip-coming" href=${linkTo('vms', migration.vm_name)} data-testid="coming-${migration.vm_name}"
    title="${migration.vm_name} is coming from ${migration.source_name}">
    ${migration.vm_name}<span class="chip-fill" style=${{ transform: `scaleX(${migrationShare(migration)})` }} aria-hidden="true"></span>
      <span class="hidden">, coming from ${migration.source_name}</span>
  </a>`;
}

function useArrival(vm) {
  const [arrived, setArrived] = useState(false);
  const known = useRef(lastHost.get(vm.id));
  useEffect(() => {
    lastHost.set(vm.id, vm.host);
    if (!known.current || known.current === vm.host) return undefined;
    known.current = vm.host;
    setArrived(true);
    const timer = setTimeout(() => setArrived(false), ARRIVAL_MS);
    return () => clearTimeout(timer);
  }, [vm.host]);
  return arrived;
}
