"""Prove things without a database: digests, the audit log's chain, signatures, C2PA manifests, perceptual hashes."""
