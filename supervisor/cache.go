package supervisor

import (
	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// chooseCaching lets the guest read anew what it may keep of a container's files,
// if it must: with virtiofs, where nothing is kept; and the root file system if
// there has been a container of this name in the pod, whose root the guest
// remembers by the same path. Of volumes the share knows what is remembered.
func (s *Supervisor) chooseCaching(m *machine, req *agentv1.CreateContainerRequest) {
	chooseVolumes(m, req)
	if req.Rootfs.GetShareTag() != agentv1.CachedShareTag {
		return
	}
	s.mu.Lock()
	again := s.cached[req.ContainerId]
	s.cached[req.ContainerId] = true
	s.mu.Unlock()
	if again || m.files != nil {
		req.Rootfs.ShareTag = agentv1.ShareTag
	}
}

// chooseVolumes does so for a container's volumes, before they are in the share if
// the machine is known by then.
func chooseVolumes(m *machine, req *agentv1.CreateContainerRequest) {
	if m == nil || m.files == nil {
		return
	}
	for _, mount := range req.Mounts {
		if mount.ShareTag == agentv1.CachedShareTag {
			mount.ShareTag = agentv1.ShareTag
		}
	}
}
