package supervisor

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
)

var errNoNamespace = status.Error(codes.FailedPrecondition, "the pod's network is not that of a namespace")

// ListInterfaces implements the API.
func (v *service) ListInterfaces(context.Context, *supervisorv1.ListInterfacesRequest) (*supervisorv1.ListInterfacesResponse, error) {
	return nil, errNoNamespace
}

// AddInterface implements the API.
func (v *service) AddInterface(context.Context, *supervisorv1.AddInterfaceRequest) (*supervisorv1.AddInterfaceResponse, error) {
	return nil, errNoNamespace
}

// UpdateInterface implements the API.
func (v *service) UpdateInterface(context.Context, *supervisorv1.UpdateInterfaceRequest) (*supervisorv1.UpdateInterfaceResponse, error) {
	return nil, errNoNamespace
}

// RemoveInterface implements the API.
func (v *service) RemoveInterface(context.Context, *supervisorv1.RemoveInterfaceRequest) (*supervisorv1.RemoveInterfaceResponse, error) {
	return nil, errNoNamespace
}
