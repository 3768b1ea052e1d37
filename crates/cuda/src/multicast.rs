//! A window of each rank's memory that one address reaches on all ranks, through the switch that connects them (NVLink SHARP): what is read
//! there is the sum of what all have there, added up on the way, and what is written there all get.
//!
//! The ranks of one node hold the multicast object in common; those of other nodes import it by its fabric handle. Not yet run on several GPUs.

use crate::device::{Buffer, Device};
use crate::fabric::{agree, agree_on, tell};
use crate::mapping::{Binding, Handle, Mapping, Reach, multicast_granularity};
use rudder_comm::Member;
use rudder_ops::{OpError, Result};
use std::sync::Arc;

/// NCCL's variable that keeps it from using the switch so; 0 keeps us too.
const VARIABLE: &str = "NCCL_NVLS_ENABLE";
/// What ranks do without where a step towards it fails.
const WHAT: &str = "ranks do not add up in the switch";

/// A rank's window. The order counts: it is given back from the first on.
pub(crate) struct Window {
    all: Mapping,
    _part: Binding,
    own: Buffer,
}

impl Window {
    /// Makes the ranks' windows of so many bytes. All call it, and all get one or none; why, the first rank that could not says in the log.
    ///
    /// # Errors
    /// If a rank failed.
    pub fn connect(device: &Device, member: &Member, bytes: usize) -> Result<Option<Self>> {
        let rank = member.rank();
        let reach = if member.local().len() < rank.world { Reach::Fabric } else { Reach::Process };
        let size = size(device, rank.world, bytes, reach).map(|size| size as u64);
        let Some(sizes) = agree(member, WHAT, size.as_ref().copied())? else { return Ok(None) };
        let size = sizes.into_iter().max().unwrap_or(0) as usize;
        let Some(object) = object(device, member, size, reach)? else { return Ok(None) };
        // Memory is bound only once all devices are there, and mapped once all of it is bound.
        if agree_on(member, WHAT, object.add(device, rank.index))?.is_none() {
            return Ok(None);
        }
        let bound = bind(&object, device, size, reach, rank.index);
        let Some((part, own)) = agree_on(member, WHAT, bound)? else { return Ok(None) };
        let all = Mapping::new(&object, size, &[device.ordinal()], rank.index);
        let Some(all) = agree_on(member, WHAT, all)? else { return Ok(None) };
        Ok(Some(Self { all, _part: part, own: device.mapped(own, bytes) }))
    }

    /// Where this rank's own memory begins, for its own kernels' usual accesses.
    pub fn own(&self) -> u64 {
        self.own.address()
    }

    /// Where all ranks' memory begins, for `multimem` instructions alone.
    pub fn all(&self) -> u64 {
        self.all.address()
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // No kernel of this rank uses it any more; nor do the others', which a kernel meets before it ends.
        if let Err(e) = self.own.device().synchronize() {
            tracing::warn!("{e}");
        }
    }
}

/// The size of a window of so many bytes and more.
fn size(device: &Device, world: usize, bytes: usize, reach: Reach) -> Result<usize> {
    if std::env::var_os(VARIABLE).is_some_and(|value| value == "0") {
        return Err(OpError::Backend(format!("{VARIABLE} is 0")));
    }
    Ok(bytes.next_multiple_of(multicast_granularity(device, world, bytes, reach)?))
}

/// The ranks' multicast object, which rank 0 makes and the first rank of each other node imports.
fn object(device: &Device, member: &Member, size: usize, reach: Reach) -> Result<Option<Arc<Handle>>> {
    let (rank, local) = (member.rank(), member.local());
    let made = (rank.index == 0).then(|| Handle::multicast(device, rank.world, size, reach)).transpose();
    let made = made.and_then(|object| match &object {
        Some(made) if reach == Reach::Fabric => Ok((made.export()?, object)),
        _ => Ok(([0; 8], object)),
    });
    let Some((name, mut made)) = agree_on(member, WHAT, made)? else { return Ok(None) };
    if reach == Reach::Fabric {
        let name = tell(member, name)?[0];
        let imports = rank.index == local.start && rank.index > 0;
        let imported = imports.then(|| Handle::import(device, name)).transpose();
        let Some(imported) = agree_on(member, WHAT, imported)? else { return Ok(None) };
        made = made.or(imported);
    }
    hand_out(member, made.map(Arc::new))
}

/// Memory of this rank, bound to the object and mapped for its own accesses.
fn bind(
    object: &Arc<Handle>,
    device: &Device,
    size: usize,
    reach: Reach,
    rank: usize,
) -> Result<(Binding, Mapping)> {
    let memory = Arc::new(Handle::memory(device, size, reach)?);
    let own = Mapping::new(&memory, size, &[device.ordinal()], rank)?;
    Ok((Binding::new(object, &memory, size, device, rank)?, own))
}

/// Gives all ranks of a node what the first of them has; the last that has it releases it.
fn hand_out(member: &Member, made: Option<Arc<Handle>>) -> Result<Option<Arc<Handle>>> {
    let local = member.local();
    // One for each rank: if one fails before it takes its own, the object stays, and nobody finds it gone.
    let raw = made.map_or(1, |object| {
        (1..local.len()).for_each(|_| std::mem::forget(Arc::clone(&object)));
        Arc::into_raw(object).expose_provenance() as u64
    });
    let Some(told) = agree(member, WHAT, Ok(raw))? else { return Ok(None) };
    let first = std::ptr::with_exposed_provenance(told[local.start] as usize);
    // SAFETY: the first rank's pointer, of this process; each rank here takes over one of the counts that it made.
    Ok(Some(unsafe { Arc::from_raw(first) }))
}

#[cfg(all(test, feature = "emulate"))]
mod tests {
    use super::*;
    use rudder_comm::Group;

    /// Whether each of two ranks gets a window that asks for one of so many bytes.
    fn windows(bytes: [usize; 2]) -> Vec<bool> {
        let group = Group::new(2);
        std::thread::scope(|scope| {
            let ranks = group.members().into_iter().map(|member| {
                let bytes = bytes[member.rank().index];
                scope.spawn(move || {
                    Window::connect(&Device::emulated(), &member, bytes).map(|window| window.is_some())
                })
            });
            let ranks: Vec<_> = ranks.collect();
            ranks.into_iter().map(|rank| rank.join().expect("no panic").expect("no rank fails")).collect()
        })
    }

    #[test]
    fn where_one_rank_gets_no_window_none_does() {
        assert_eq!(windows([64, 64]), [true; 2]);
        assert_eq!(windows([64, 1 << 50]), [false; 2]);
        assert_eq!(windows([1 << 50, 64]), [false; 2]);
    }

    #[test]
    fn what_one_rank_made_all_have_and_the_last_releases() {
        let group = Group::new(3);
        let made = Handle::memory(&Device::emulated(), 4096, Reach::Process).expect("a page");
        let made = Arc::new(made);
        std::thread::scope(|scope| {
            for member in group.members() {
                let made = (member.rank().index == 0).then(|| Arc::clone(&made));
                scope.spawn(move || {
                    let object = hand_out(&member, made).expect("no rank fails").expect("rank 0 made it");
                    member.share(0, &mut [0; 3]).expect("no rank fails");
                    assert!(Arc::strong_count(&object) > 1);
                });
            }
        });
        assert_eq!(Arc::strong_count(&made), 1);
    }
}
