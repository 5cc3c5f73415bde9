package agent

import agentv1 "github.com/hyperhq/runv/api/agent/v1"

// updateNetwork makes the pod's network what cfg says.
func (a *Agent) updateNetwork(*agentv1.NetworkConfig) error {
	return invalid("the pod's network is not that of a namespace")
}
