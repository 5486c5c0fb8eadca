//! What hosts still have to destroy, reported or not: a command that starts a VM may reach a host after the VM
//! was taken from it for its silence.
//!
//! The debt itself is in the VM's record, written when the VM is taken. Every reply to the host carries it until
//! the host says that it has carried out the orders of such a reply; from then on it refuses that command.
//! Which replies carried which debt is kept in memory only: after a server's start they are sent again.

use godwit_wire::id::{Epoch, HostId, VmId};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Copies that may be left at a host, by the epoch they had there.
pub(crate) type LeftBehind = BTreeMap<VmId, Epoch>;

/// See the module.
#[derive(Debug)]
pub(crate) struct Debts(Mutex<Told>);

#[derive(Debug)]
struct Told {
    /// Number of this server's first reply.
    first: u64,
    next: u64,
    /// The epoch each debt has, and the first reply that carried it.
    carried: BTreeMap<HostId, BTreeMap<VmId, (Epoch, u64)>>,
}

impl Debts {
    /// `first` is the number of the first reply; no reply of an earlier server may have this or a later one.
    pub(crate) fn new(first: u64) -> Self {
        Self(Mutex::new(Told {
            first,
            next: first,
            carried: BTreeMap::new(),
        }))
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Numbers a reply that carries all debts of a host. They are looked up while no other reply is numbered, so
    /// that a reply carries every debt that one with a lower number does.
    pub(crate) fn reply(
        &self,
        host: HostId,
        look: impl FnOnce() -> LeftBehind,
    ) -> (u64, LeftBehind) {
        let mut told = self.told();
        let number = told.next;
        told.next += 1;
        let debts = look();
        let before = told.carried.remove(&host).unwrap_or_default();
        let since = |vm: &VmId, epoch: &Epoch| match before.get(vm) {
            Some((known, first)) if known == epoch => *first,
            _ => number,
        };
        let carried: BTreeMap<_, _> = debts
            .iter()
            .map(|(vm, epoch)| (*vm, (*epoch, since(vm, epoch))))
            .collect();
        if !carried.is_empty() {
            told.carried.insert(host, carried);
        }
        (number, debts)
    }

    /// Debts that a host has paid when it has carried out the orders of reply `obeyed`.
    pub(crate) fn paid(&self, host: HostId, obeyed: u64) -> LeftBehind {
        let told = self.told();
        // What another server process has numbered says nothing about the replies of this one.
        if !(told.first..told.next).contains(&obeyed) {
            return LeftBehind::new();
        }
        let carried = told.carried.get(&host).into_iter().flatten();
        carried
            .filter(|(_, (_, first))| *first <= obeyed)
            .map(|(vm, (epoch, _))| (*vm, *epoch))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    const HOST: HostId = HostId(Uuid::from_u128(1));
    const VM: VmId = VmId(Uuid::from_u128(2));

    fn owing(epoch: u64) -> LeftBehind {
        LeftBehind::from([(VM, Epoch(epoch))])
    }

    #[test]
    fn a_debt_is_paid_by_obeying_the_first_reply_that_carried_it_or_a_later_one() {
        let debts = Debts::new(100);
        let (before, _) = debts.reply(HOST, LeftBehind::new);
        let (first, _) = debts.reply(HOST, || owing(1));
        let (later, _) = debts.reply(HOST, || owing(1));
        assert_eq!(debts.paid(HOST, before), LeftBehind::new());
        assert_eq!(debts.paid(HOST, first), owing(1));
        assert_eq!(debts.paid(HOST, later), owing(1));
    }

    #[test]
    fn a_debt_of_a_later_epoch_is_a_new_one() {
        let debts = Debts::new(100);
        let (old, _) = debts.reply(HOST, || owing(1));
        let (new, _) = debts.reply(HOST, || owing(3));
        assert_eq!(debts.paid(HOST, old), LeftBehind::new());
        assert_eq!(debts.paid(HOST, new), owing(3));
    }

    #[test]
    fn replies_of_another_server_pay_nothing() {
        let debts = Debts::new(100);
        debts.reply(HOST, || owing(1));
        assert_eq!(debts.paid(HOST, 99), LeftBehind::new());
        assert_eq!(debts.paid(HOST, 101), LeftBehind::new());
    }
}
