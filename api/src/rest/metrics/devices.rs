//! What the devices of VMs count, as their hosts told it last.

use godwit_controller::view::View;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::collections::BTreeMap;

/// Longest name of a kind or a counter that becomes the name of a metric.
const MAX_NAME_BYTES: usize = 32;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeviceLabels {
    vm: String,
    device: String,
}

/// Figures of one name.
enum Figures {
    /// They only grow.
    Counters(Family<DeviceLabels, Counter>),
    /// They come and go.
    Gauges(Family<DeviceLabels, Gauge>),
}

/// The balloon also tells how large things are at the moment.
fn is_gauge(kind: &str, counter: &str) -> bool {
    kind == "balloon"
        && (counter.starts_with("guest_") || ["target_bytes", "actual_bytes"].contains(&counter))
}

/// What hosts say becomes part of a metric's name: nothing but such names passes.
fn is_name(text: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

/// `godwit_vm_block_read_bytes_total{vm, device}` and its like, for every VM that has a machine.
pub(super) fn register(registry: &mut Registry, view: &View) {
    let mut figures: BTreeMap<(&str, &str), Figures> = BTreeMap::new();
    for vm in view.vms.values() {
        let devices = view.report(vm).and_then(|report| report.devices.as_ref());
        for device in devices.into_iter().flatten() {
            let labels = DeviceLabels {
                vm: vm.name.clone(),
                device: device.name.clone(),
            };
            let named = device.counters.iter();
            for (counter, value) in named.filter(|(name, _)| is_name(name) && is_name(&device.kind))
            {
                let family = figures
                    .entry((device.kind.as_str(), counter.as_str()))
                    .or_insert_with(|| match is_gauge(&device.kind, counter) {
                        true => Figures::Gauges(Family::default()),
                        false => Figures::Counters(Family::default()),
                    });
                match family {
                    Figures::Counters(family) => {
                        family.get_or_create(&labels).inc_by(*value);
                    }
                    Figures::Gauges(family) => {
                        family.get_or_create(&labels).set(super::signed(*value));
                    }
                }
            }
        }
    }
    for ((kind, counter), figures) in figures {
        let name = format!("vm_{kind}_{counter}");
        let words = counter.replace('_', " ");
        let help = format!("Of a VM's {kind} device, since its machine was built: {words}");
        match figures {
            Figures::Counters(family) => registry.register(name, help, family),
            Figures::Gauges(family) => {
                registry.register(name, format!("Of a VM's {kind} device: {words}"), family);
            }
        }
    }
}
