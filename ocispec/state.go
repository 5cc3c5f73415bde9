package ocispec

import (
	"github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// State is a container's state as the OCI runtime specification defines it: what
// `state` prints and what hooks read. Pid is the stand-in's, on the host; a
// stopped container has none.
func State(h *agentv1.HookState, status specs.ContainerState, pid int) *specs.State {
	s := &specs.State{
		Version:     h.GetOciVersion(),
		ID:          h.GetId(),
		Status:      status,
		Pid:         pid,
		Bundle:      h.GetBundle(),
		Annotations: h.GetAnnotations(),
	}
	if status == specs.StateStopped {
		s.Pid = 0
	}
	return s
}
