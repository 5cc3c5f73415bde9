package supervisor

import (
	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// chooseCaching lets the guest read anew what it may keep of a container's files,
// if it must: with virtiofs, where nothing is kept; and the root file system if
// there has been a container of this name in the pod, whose root the guest
// remembers by the same path. A volume that it may keep has a path of its own.
func (s *Supervisor) chooseCaching(m *machine, req *agentv1.CreateContainerRequest) {
	fresh := func(tag *string) {
		if *tag == agentv1.CachedShareTag {
			*tag = agentv1.ShareTag
		}
	}
	if m.files != nil {
		for _, mount := range req.Mounts {
			fresh(&mount.ShareTag)
		}
	}
	if req.Rootfs.GetShareTag() != agentv1.CachedShareTag {
		return
	}
	s.mu.Lock()
	again := s.cached[req.ContainerId]
	s.cached[req.ContainerId] = true
	s.mu.Unlock()
	if again || m.files != nil {
		fresh(&req.Rootfs.ShareTag)
	}
}
