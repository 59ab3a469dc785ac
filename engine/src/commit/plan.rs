//! The bounds of a plan, which is the guest's last word before the first change.

use crate::image::ChainImage;
use instar_guest_protocol::commit::Plan;

/// The bounds of a plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlanBounds {
    /// Virtual size of the overlay in bytes: no more can be committed.
    pub virtual_size: u64,
    /// Cluster size of the overlay in bytes, or 0.
    pub overlay_cluster: u64,
    /// Cluster size of the backing in bytes, or 0.
    pub backing_cluster: u64,
    /// The maximum length of all the backing's files together, in bytes.
    pub longest: u64,
}

impl PlanBounds {
    /// Make the bounds for an overlay and a backing whose files may become `longest` bytes long together.
    #[must_use]
    pub fn of(overlay: &ChainImage<'_>, backing: &ChainImage<'_>) -> Self {
        Self {
            virtual_size: overlay.facts.virtual_size,
            overlay_cluster: overlay.facts.cluster_size,
            backing_cluster: backing.facts.cluster_size,
            longest: 0,
        }
    }

    /// Check a plan.
    ///
    /// # Errors
    /// The number that breaks a bound, in one clause.
    pub fn check(&self, plan: &Plan) -> Result<(), String> {
        let clusters = self.virtual_size.div_ceil(self.overlay_cluster.max(1));
        if plan.clusters > clusters || plan.bytes > self.virtual_size {
            return Err(format!(
                "a plan to commit {} clusters, {} bytes, of an overlay of {clusters} clusters, {} bytes",
                plan.clusters, plan.bytes, self.virtual_size
            ));
        }
        if plan.backing_final_length > self.longest {
            return Err(format!(
                "a plan that makes the backing {} bytes long, where its verdict allows {}",
                plan.backing_final_length, self.longest
            ));
        }
        let new = plan.new_data_clusters.checked_add(plan.new_metadata_clusters);
        let bytes = new.and_then(|new| new.checked_mul(self.backing_cluster.max(1)));
        // The last cluster of a file may be cut short.
        let room = self.longest.saturating_add(self.backing_cluster);
        if bytes.is_none_or(|bytes| bytes > room) {
            return Err(format!(
                "a plan for {} new clusters of data and {} of metadata, in a backing of at most {} bytes",
                plan.new_data_clusters, plan.new_metadata_clusters, self.longest
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_that_cannot_be_is_named() {
        let bounds = PlanBounds { virtual_size: 1000, overlay_cluster: 100, backing_cluster: 512, longest: 5000 };
        let good = Plan {
            clusters: 10,
            bytes: 1000,
            backing_final_length: 5000,
            new_data_clusters: 4,
            new_metadata_clusters: 6,
            encoded_bytes: 0,
        };
        assert_eq!(bounds.check(&good), Ok(()));
        for (wrong, why) in [
            (Plan { clusters: 11, ..good }, "of 10 clusters"),
            (Plan { bytes: 1001, ..good }, "1001 bytes"),
            (Plan { backing_final_length: 5001, ..good }, "verdict allows 5000"),
            (Plan { new_data_clusters: 5, ..good }, "5 new clusters of data"),
            (Plan { new_data_clusters: u64::MAX, new_metadata_clusters: 1, ..good }, "new clusters"),
            (Plan { new_metadata_clusters: u64::MAX / 2, ..good }, "new clusters"),
        ] {
            assert!(bounds.check(&wrong).is_err_and(|text| text.contains(why)), "{why}");
        }
        assert!(PlanBounds::default().check(&Plan::default()).is_ok());
    }
}
