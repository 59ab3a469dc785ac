//! What a plan comes to: which free clusters it uses, and how long the backing becomes.

use crate::image::{overflow, Image};
use crate::refcount::forecast::{Demand, Forecast};
use crate::refcount::free_clusters::FreeClusters;
use crate::refcount::space::Space;
use crate::write::backing::Backing;
use crate::write::cross_check::cross_check;
use crate::write::lost_data::{last_cluster_is_cut_data, refuse_lost_data};
use crate::write::plan::Plan;
use alloc::format;
use instar_guest_sdk::abi::{ErrorCode, PlanSummary};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::HostCluster;

/// The result of planning, once all windows were looked at. `repaired` tells whether the backing was not closed cleanly.
///
/// # Errors
/// Corruption; [`ErrorCode::NoSpace`] on a device that is too small; I/O errors.
pub(crate) fn summarize(
    io: &mut dyn BlockIo,
    backing: &mut Backing,
    plan: &mut Plan,
    repaired: bool,
) -> DriverResult<PlanSummary> {
    let single = plan.needs.single();
    let allocates = single + plan.needs.run_span > 0;
    if single > 0 && last_cluster_is_cut_data(io, backing, &plan.metadata)? {
        refuse_lost_data(io, &backing.image)?;
    }
    let mut free = FreeClusters::default();
    if single > 0 {
        // On a device, the allocator comes by what follows.
        let limit = if backing.image.fixed_length { backing.space.allocator.next() } else { HostCluster(u64::MAX) };
        free = FreeClusters::find(io, &backing.image, &mut backing.space.refcounts, &plan.metadata, single, limit)?;
    }
    let mut demand = Demand { span: plan.needs.run_span, count: single.saturating_sub(free.count()) };
    let forecast = if backing.image.fixed_length && allocates {
        let forecast = forecast(io, backing, plan, demand)?;
        backing.space.free = cross_check(io, backing, plan, (free, allocates, repaired))?;
        if backing.space.free.count() + demand.count < single {
            let text = "a cluster with refcount 0 is in use: run `instar check -r all` on it first";
            return Err(backing.image.corrupt(backing.image.header.refcount_table.0, text));
        }
        forecast
    } else {
        backing.space.free = cross_check(io, backing, plan, (free, allocates, repaired))?;
        demand.count = single - backing.space.free.count();
        forecast(io, backing, plan, demand)?
    };
    if forecast.passed_over > 0 && !backing.image.fixed_length {
        refuse_lost_data(io, &backing.image)?;
    }
    let end = forecast.end.0.checked_mul(backing.image.cluster_size().bytes());
    let end = end.ok_or_else(|| overflow("the length of the backing"))?;
    if end > backing.image.max_length && demand != Demand::default() {
        return Err(over_bound(&backing.image, forecast.passed_over, end));
    }
    Ok(PlanSummary {
        // On a device, how much of it the image takes: somebody may need what is behind that.
        final_length: end,
        new_data_clusters: plan.needs.data,
        new_metadata_clusters: plan.needs.tables + plan.needs.runs,
        unread_tables: plan.unread_tables,
    })
}

/// What allocating comes to; on a device, the clusters concerned must be no metadata.
fn forecast(io: &mut dyn BlockIo, backing: &mut Backing, plan: &mut Plan, demand: Demand) -> DriverResult<Forecast> {
    let fixed = backing.image.fixed_length;
    let (fresh, metadata) = (&mut plan.touched.fresh, &plan.metadata);
    let Space { allocator, refcounts, .. } = &mut backing.space;
    let mut overlap = None;
    let forecast = allocator.forecast(io, &backing.image, refcounts, demand, &mut |run| {
        if fixed {
            let end = run.start.0 + run.count;
            if metadata.overlaps(run.start.0, end) {
                overlap = Some(run.start);
            }
            run.clusters().for_each(|cluster| {
                fresh.insert(cluster);
            });
        }
    })?;
    if let Some(first) = overlap {
        let offset = backing.image.cluster_size().host_offset(first).unwrap_or_default();
        let text =
            format!("metadata at or after offset {offset} has refcount 0: run `instar check -r all` on it first");
        return Err(backing.image.corrupt(offset.0, text));
    }
    Ok(forecast)
}

/// The refusal of a plan that would make the file `end` bytes long: more than it may become.
pub(crate) fn over_bound(image: &Image, passed_over: u64, end: u64) -> DriverError {
    if image.fixed_length {
        let missing = end - image.max_length.min(end);
        let text = format!("the device is too small: {missing} bytes are missing, enlarge it");
        return DriverError::new(ErrorCode::NoSpace, text).at(image.device, image.max_length);
    }
    if passed_over == 0 {
        return overflow("the length that the backing may have");
    }
    image.corrupt(
        48,
        format!(
            "{passed_over} clusters past the end of the file have a refcount, so that it cannot grow there: let a copy take its place, \
             as `instar convert` makes it"
        ),
    )
}
