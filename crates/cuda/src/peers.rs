//! Ranks on several devices that meet in the host's memory.
//!
//! What ranks add up is copied to the host, summed there in the order of the ranks and copied back. That works between any devices
//! of one host and is slow: each of a layer's two sums takes two copies and a wait.

use crate::step::{bytes, bytes_mut};
use crate::tensor::{Format, Tensor};
use rudder_comm::Member;
use rudder_ops::{Rank, Result};

/// A device's place among the ranks of a model that is cut.
pub(crate) struct Peers {
    member: Member,
    /// What this rank shows.
    part: Vec<f32>,
    /// What rank 0 gathers.
    whole: Vec<f32>,
}

impl Peers {
    pub fn new(member: Member) -> Self {
        Self { member, part: Vec::new(), whole: Vec::new() }
    }

    pub fn rank(&self) -> Rank {
        self.member.rank()
    }

    /// Makes `x` the sum over the ranks.
    pub fn all_reduce(&mut self, x: &Tensor) -> Result<()> {
        x.expect_f32("what ranks add up")?;
        let part = sized(&mut self.part, x.elements());
        x.buffer.read(0, bytes_mut(part))?;
        self.member.all_reduce(part)?;
        x.buffer.write(0, bytes(part))
    }

    /// Puts the ranks' parts side by side on rank 0.
    pub fn gather_columns(&mut self, x: &Tensor, whole: Option<&mut Tensor>) -> Result<()> {
        x.expect_f32("what ranks gather")?;
        let part = sized(&mut self.part, x.elements());
        x.buffer.read(0, bytes_mut(part))?;
        let Some(out) = whole else { return Ok(self.member.gather(part, x.rows, None)?) };
        out.set(x.rows, out.width, Format::F32)?;
        let whole = sized(&mut self.whole, out.elements());
        self.member.gather(part, x.rows, Some(&mut *whole))?;
        out.buffer.write(0, bytes(whole))
    }
}

/// The first `len` elements, growing the buffer when it was never that long.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(buffer.len().max(len), 0.0);
    &mut buffer[..len]
}
