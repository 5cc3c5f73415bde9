package supervisor

import (
	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// chooseCaching lets the guest read anew what it may keep of a container's files,
// if it must: with virtiofs, where nothing is kept; and if there has been a
// container of this name in the pod, whose files the guest remembers by the same
// paths.
func (s *Supervisor) chooseCaching(m *machine, req *agentv1.CreateContainerRequest) {
	s.mu.Lock()
	again := s.cached[req.ContainerId]
	s.mu.Unlock()
	keep, used := m.files == nil && !again, false
	choose := func(tag *string) {
		if *tag != agentv1.CachedShareTag {
			return
		}
		used = true
		if !keep {
			*tag = agentv1.ShareTag
		}
	}
	if req.Rootfs != nil {
		choose(&req.Rootfs.ShareTag)
	}
	for _, mount := range req.Mounts {
		choose(&mount.ShareTag)
	}
	if used {
		s.mu.Lock()
		s.cached[req.ContainerId] = true
		s.mu.Unlock()
	}
}
