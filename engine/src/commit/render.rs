//! What is printed.

use super::error::CommitError;
use super::result::CommitRunResult;
use crate::cli::escape::escape_json;
use crate::cli::OutputFormat;
use serde_json::{json, Value};

fn pretty(value: &Value) -> String {
    // Maps with text keys can always be written.
    let text = serde_json::to_string_pretty(value).unwrap_or_default();
    escape_json(&text) + "\n"
}

/// The report of a commit that succeeded, with its line feed.
#[must_use]
pub fn render_commit_success(result: &CommitRunResult, output: OutputFormat) -> String {
    match output {
        OutputFormat::Human => "Image committed.\n".to_owned(),
        OutputFormat::Json => pretty(&json!({
            "overlay": result.overlay.to_string_lossy(),
            "overlay_format": result.overlay_format,
            "backing": result.backing.to_string_lossy(),
            "backing_format": result.backing_format,
            "clusters_committed": result.clusters_committed,
            "bytes_committed": result.bytes_committed,
            "overlay_clusters_cleared": result.overlay_clusters_cleared,
        })),
    }
}

/// The report of a commit that failed, with its line feed.
#[must_use]
pub fn render_commit_error(error: &CommitError, output: OutputFormat) -> String {
    match output {
        OutputFormat::Human => format!("instar: {}\n", error.message),
        OutputFormat::Json => {
            let value = json!({"error": {
                "code": error.code.number(),
                "name": error.code.name(),
                "message": error.message,
            }});
            escape_json(&value.to_string()) + "\n"
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use instar_guest_abi::ErrorCode;
    use std::path::PathBuf;

    #[test]
    fn success_is_as_the_contract_says() {
        let result = CommitRunResult {
            overlay: PathBuf::from("/abs/path/to/overlay.qcow2"),
            overlay_format: "qcow2".into(),
            backing: PathBuf::from("/abs/path/to/base.qcow2"),
            backing_format: "qcow2".into(),
            clusters_committed: 16,
            bytes_committed: 1_048_576,
            overlay_clusters_cleared: 16,
        };
        assert_eq!(render_commit_success(&result, OutputFormat::Human), "Image committed.\n");
        let expected = r#"{
  "overlay": "/abs/path/to/overlay.qcow2",
  "overlay_format": "qcow2",
  "backing": "/abs/path/to/base.qcow2",
  "backing_format": "qcow2",
  "clusters_committed": 16,
  "bytes_committed": 1048576,
  "overlay_clusters_cleared": 16
}
"#;
        assert_eq!(render_commit_success(&result, OutputFormat::Json), expected);
    }

    #[test]
    fn errors_are_one_line_whatever_is_in_them() {
        let error = CommitError::new(ErrorCode::NoBacking, "a\nb\x1b[2Jc\u{202e}\"d");
        let human = render_commit_error(&error, OutputFormat::Human);
        assert_eq!(human, "instar: a\\nb\\x1b[2Jc\\u{202e}\"d\n");
        let json: Value = serde_json::from_str(&render_commit_error(&error, OutputFormat::Json)).unwrap();
        assert_eq!(json["error"]["code"], 2);
        assert_eq!(json["error"]["name"], "ERROR_NO_BACKING");
        assert_eq!(json["error"].as_object().unwrap().len(), 3);
    }
}
