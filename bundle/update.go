package bundle

import (
	specs "github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/ocispec"
)

// Update makes a request of the limits that a container has and what is to
// change. The guest is told what is different afterwards, and nothing else.
func Update(old, change *specs.LinuxResources, warn func(line string)) (*supervisorv1.UpdateRequest, error) {
	merged := ocispec.MergeResources(old, change)
	// Processors that the VM does not have are the host's to keep away from; so
	// are those here, of which nobody knows yet how many there are.
	const anyVCPUs = 1
	after, err := ocispec.TranslateResources(merged, anyVCPUs, warn)
	if err != nil {
		return nil, err
	}
	before, err := ocispec.TranslateResources(ocispec.MergeResources(old, nil), anyVCPUs, func(string) {})
	if err != nil {
		before = &agentv1.Resources{}
	}
	files := make(map[string]string)
	for name, v := range after.Unified {
		if before.Unified[name] != v {
			files[name] = v
		}
	}
	limits := ocispec.HostResources(merged)
	if limits == nil {
		limits = &supervisorv1.LinuxResources{}
	}
	return &supervisorv1.UpdateRequest{Guest: &agentv1.Resources{Unified: files}, Resources: limits}, nil
}
