//! What allocating would come to: planning counts, to the cluster, what [`allocator`](crate::refcount::allocator) will
//! hand out.

use crate::image::{overflow, Image};
use crate::metadata::cluster_run::ClusterRun;
use crate::refcount::allocator::{growth, Allocator, SLICES_HELD};
use crate::refcount::blocks::Refcounts;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::HostCluster;

/// What handing out clusters would come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forecast {
    /// The cluster after the last one, which may lie past the end of a device.
    pub end: HostCluster,
    /// Clusters that were passed over because they have a refcount.
    pub passed_over: u64,
}

/// The clusters that a forecast has to provide for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// Clusters that follow each other, together with the refcount blocks that describe them: they go first.
    pub span: u64,
    /// Single clusters.
    pub count: u64,
}

impl Allocator {
    /// Work out which clusters `demand` will take, refcount blocks and a larger table included, and hand them to
    /// `taken`, run by run. Nothing is handed out. A table that grows will have room for all of it.
    ///
    /// # Errors
    /// [`ErrorCode::RefcountExhausted`](instar_guest_sdk::abi::ErrorCode::RefcountExhausted) if the refcount table cannot
    /// grow so far; corruption of the table; I/O errors.
    pub fn forecast(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        refcounts: &mut Refcounts,
        demand: Demand,
        taken: &mut dyn FnMut(ClusterRun),
    ) -> DriverResult<Forecast> {
        loop {
            let forecast = self.forecast_once(io, image, refcounts, demand, &mut |_| {})?;
            let last = forecast.end.0.saturating_sub(1) / refcounts.per_block();
            if last < refcounts.table_entries || last <= self.last_block {
                return self.forecast_once(io, image, refcounts, demand, taken);
            }
            // One new table, made at once for everything that is planned.
            self.last_block = last;
        }
    }

    fn forecast_once(
        &self,
        io: &mut dyn BlockIo,
        image: &Image,
        refcounts: &mut Refcounts,
        demand: Demand,
        taken: &mut dyn FnMut(ClusterRun),
    ) -> DriverResult<Forecast> {
        let size = image.cluster_size();
        let per_block = refcounts.per_block();
        let mut entries = refcounts.table_entries;
        let mut at = self.next.0;
        // Clusters before this one that new blocks describe: they are free.
        let mut described = 0;
        let (mut span, mut left, mut used) = (demand.span, demand.count, 0u64);
        let mut take = |at: &mut u64, count: u64| {
            taken(ClusterRun { start: HostCluster(*at), count });
            used += count;
            *at = at.checked_add(count).ok_or_else(|| overflow("the length of the file"))?;
            DriverResult::Ok(())
        };
        while span + left > 0 {
            let index = at / per_block;
            let end = (index + 1) * per_block;
            if index >= entries {
                let (blocks, clusters) = growth((per_block, entries), size, HostCluster(at), self.last_block)?;
                take(&mut at, blocks + clusters)?;
                entries = clusters * size.l2_entries();
                described = (index + blocks) * per_block;
            } else if span > 0 {
                take(&mut at, span)?;
                span = 0;
            } else if at < described {
                let count = left.min(end - at);
                take(&mut at, count)?;
                left -= count;
            } else if !refcounts.describes(io, image, index)? {
                take(&mut at, 1)?;
                described = end;
            } else {
                let until = refcounts.look_ahead(image, at, left);
                refcounts.blocks.shrink(SLICES_HELD);
                refcounts.load(io, image, (at..until).map(HostCluster))?;
                let mut next = until;
                let mut result = Ok(());
                refcounts.each_free_run(image, at, until, &mut |first, after| {
                    let mut start = first;
                    let count = left.min(after - first);
                    result = take(&mut start, count);
                    left -= count;
                    if left == 0 {
                        next = start;
                    }
                    left > 0 && result.is_ok()
                })?;
                result?;
                at = next;
            }
        }
        Ok(Forecast { end: HostCluster(at), passed_over: at - self.next.0 - used })
    }
}
